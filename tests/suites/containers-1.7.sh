#!/usr/bin/env bash
# Single containers on containerd 1.7, which starts shims with the older protocol.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
set_up_containerd 1.7 busybox debian one-binary

every_case
separate_cases
finish
