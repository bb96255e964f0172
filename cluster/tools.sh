#!/bin/sh
# Installs Prometheus and Chromium, which some tests need. It installs them only on Debian as root. Otherwise it prints which
# packages are missing. The script never fails, because those tests are skipped without the programs (unless CI is set).
set -u

installed() {
    for program in "$@"; do command -v "$program" > /dev/null || return 1; done
}

get() { # has time limits, so that a machine without a network does not hang
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq -o Acquire::http::Timeout=20 -o Acquire::Retries=1 "$@" < /dev/null
}

bring() {
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "Installing $*"
        # If the installation fails, the lists of packages may be missing or old.
        for try in first second; do
            get install --yes --no-install-recommends "$@" > /dev/null 2>&1 && return 0
            [ "$try" = first ] && get update > /dev/null 2>&1
        done
    fi
    return 1
}

wanted() { # arguments: the packages, then the programs that they provide
    packages=$1
    shift
    installed "$@" && return
    # shellcheck disable=SC2086 # $packages is a list
    bring $packages || echo "Without $packages some tests are skipped. On Debian: sudo apt-get install --no-install-recommends $packages"
}

had_prometheus=$(command -v prometheus)
wanted "prometheus" prometheus promtool
wanted "chromium chromium-driver" chromium chromedriver

# Debian's package starts a Prometheus server on all addresses. It is not needed here, so it is disabled.
if [ -z "$had_prometheus" ] && [ -d /run/systemd/system ] && [ "$(id -u)" = 0 ]; then
    systemctl disable --now --quiet prometheus > /dev/null 2>&1
fi
exit 0
