#!/usr/bin/env bash
# Pods as a kubelet creates them, by the Sandbox service, on containerd 2.1: every case.
#
# Environment:
#   NUTSHELL_TEST_HANDLERS  runtime handlers (tests/lab/pods.bash), default nutshell-sandbox-service
#   NUTSHELL_TEST_FILTER    runs only the cases whose name contains it, such as `network::`
#   NUTSHELL_TEST_PROBES    seconds of the probe test, default 20
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/pods.bash"
source "$(dirname "$0")/../cases/pods.bash"
start_node 2.1 busybox debian

for handler in ${NUTSHELL_TEST_HANDLERS:-nutshell-sandbox-service}; do
  pod_cases
done
finish
