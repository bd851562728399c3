#!/usr/bin/env bash
# Network of single containers, on containerd 2.1.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/network.bash"
set_up_containerd 2.1 busybox

network_cases
finish
