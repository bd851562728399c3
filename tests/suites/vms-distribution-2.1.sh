#!/usr/bin/env bash
# Pods that boot a whole Debian 13, on containerd 2.1.
# Takes about 25 minutes.
#
# Environment:
#   NUTSHELL_TEST_FILTER  runs only the cases whose name contains it
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/pods.bash"
source "$(dirname "$0")/../cases/pods.bash"

NUTSHELL_TEST_DISTRIBUTION=$("$(dirname "$0")/../images/distribution")
export NUTSHELL_TEST_DISTRIBUTION
start_node 2.1 busybox
ctr -n k8s.io image import --no-unpack "$NUTSHELL_TEST_DISTRIBUTION/vm-debian.tar" >/dev/null || exit 1

handler=nutshell
distribution_cases
finish
