#!/bin/sh
# Prometheus and Chromium, which some tests run: installed where that needs nobody, on Debian as root. Else a line says
# what is missing. Never fails: those tests are skipped without them.
set -u

installed() {
    for program in "$@"; do command -v "$program" > /dev/null || return 1; done
}

get() { # bounded: a machine without a network is told so, and goes on
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq -o Acquire::http::Timeout=20 -o Acquire::Retries=1 "$@" < /dev/null
}

bring() {
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "Installing $*"
        # The lists of packages may be missing or old.
        for try in first second; do
            get install --yes --no-install-recommends "$@" > /dev/null 2>&1 && return 0
            [ "$try" = first ] && get update > /dev/null 2>&1
        done
    fi
    return 1
}

wanted() { # the packages, then the programs they bring
    packages=$1
    shift
    installed "$@" && return
    # shellcheck disable=SC2086 # several packages
    bring $packages || echo "Without $packages some tests are skipped. On Debian: sudo apt-get install --no-install-recommends $packages"
}

had_prometheus=$(command -v prometheus)
wanted "prometheus" prometheus promtool
wanted "chromium chromium-driver" chromium chromedriver

# Debian's package starts a server of its own, on all addresses: nobody asked for that.
if [ -z "$had_prometheus" ] && [ -d /run/systemd/system ] && [ "$(id -u)" = 0 ]; then
    systemctl disable --now --quiet prometheus > /dev/null 2>&1
fi
exit 0
