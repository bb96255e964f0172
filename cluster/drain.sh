#!/bin/sh
# What a pod does before it is stopped: Serve starts its replicas elsewhere, as far as there is room, and those here end what
# they have begun. Takes at most that many seconds:  drain.sh 330
seconds=$1
timeout 30 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is stopped" \
    --deadline-remaining-seconds "$seconds" || exit 0 # no head, nothing to save
end=$(($(date +%s) + seconds))
while [ "$(date +%s)" -lt "$end" ] && grep -qs "^ray::Serve[R]eplica" /proc/[0-9]*/cmdline; do
    sleep 1
done
