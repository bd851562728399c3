#!/usr/bin/env bash
# Single containers on containerd 2.1: every snapshotter that needs no set-up, every way to end.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
start_containerd 2.1 busybox debian one-binary

all_cases "overlayfs"
check "terminal is one" terminal_is_one
check "100 MiB of stdin come back unharmed" stdin_comes_back_unharmed
check "vmm and fs are confined" machine_processes_are_confined
for process in shim vmm fs; do
  check "killed $process ends the container" killed_process_ends_the_container "$process"
done
check "panicking guest ends the container" panicking_guest_ends_the_container
check "machine that cannot boot says why" machine_that_cannot_boot_says_why
check "twenty start together" twenty_start_together
snapshotter=native
some_cases "native"
snapshotter=overlayfs image=debian
some_cases "debian"
check "python of the debian image runs" python_runs
finish
