#!/usr/bin/env bash
# Installation on a node (deploy/) with containerd 1.7, up to a running pod. tests/deploy has the tests that need no
# virtual machine.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/pods.bash"
source "$(dirname "$0")/../cases/deploy.bash"
start_node 1.7 busybox
forget_nutshell

check "pod runs after the install and not after the uninstall" pod_runs_after_the_install_only
finish
