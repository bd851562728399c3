#!/usr/bin/env bash
# Standard streams on containerd 2.1.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/streams.bash"
set_up_containerd 2.1 busybox

stream_cases
finish
