#!/usr/bin/env bash
# Pods as a kubelet has them, by a pause container, on containerd 2.1.
#
# NUTSHELL_TEST_HANDLERS, if set, are other runtime handlers (tests/lab/pods.bash); NUTSHELL_TEST_FILTER chooses
# cases by a part of their names.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/pods.bash"
source "$(dirname "$0")/../cases/pods.bash"
start_node 2.1 busybox debian

export NUTSHELL_TEST_PROBES=${NUTSHELL_TEST_PROBES:-60}

for handler in ${NUTSHELL_TEST_HANDLERS:-nutshell}; do
  pod_cases
done
finish
