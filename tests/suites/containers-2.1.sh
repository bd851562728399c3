#!/usr/bin/env bash
# Single containers on containerd 2.1.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/attacks.bash"
set_up_containerd 2.1 busybox debian one-binary

every_case
attack_cases
finish
