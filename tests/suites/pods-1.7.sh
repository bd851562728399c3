#!/usr/bin/env bash
# Pods as a kubelet creates them, with a pause container, on containerd 1.7.
#
# Environment:
#   NUTSHELL_TEST_HANDLERS  runtime handlers (tests/lab/pods.bash), default nutshell
#   NUTSHELL_TEST_FILTER    runs only the cases whose name contains it, such as `network::`
#   NUTSHELL_TEST_PROBES    seconds of the probe test, default 60
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/pods.bash"
source "$(dirname "$0")/../cases/pods.bash"
start_node 1.7 busybox debian

export NUTSHELL_TEST_PROBES=${NUTSHELL_TEST_PROBES:-60}

for handler in ${NUTSHELL_TEST_HANDLERS:-nutshell}; do
  pod_cases
done
finish
