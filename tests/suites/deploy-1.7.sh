#!/usr/bin/env bash
# How nutshell gets onto a node (deploy/) whose containerd is 1.7: up to a pod that runs. tests/deploy has what
# takes no machine that boots guests.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/pods.bash"
source "$(dirname "$0")/../cases/deploy.bash"
start_node 1.7 busybox
forget_nutshell

check "pod runs after the install and not after the uninstall" pod_runs_after_the_install_only
finish
