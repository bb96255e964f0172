#!/bin/sh
# A pod runs this script before it is stopped. Serve starts its replicas on other nodes, if they have room, and the replicas
# on this node finish their requests. The argument is the maximum time in seconds:  drain.sh 330
seconds=$1
timeout 30 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is stopped" \
    --deadline-remaining-seconds "$seconds" || exit 0 # without a head there are no requests to finish
end=$(($(date +%s) + seconds))
while [ "$(date +%s)" -lt "$end" ] && grep -qs "^ray::Serve[R]eplica" /proc/[0-9]*/cmdline; do
    sleep 1
done
