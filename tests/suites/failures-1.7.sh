#!/usr/bin/env bash
# What happens when something around the containers fails, and chaos: random kills at random moments.
# On containerd 1.7.
#
# NUTSHELL_TEST_ROUNDS is the number of chaos rounds, 8 if not set; NUTSHELL_TEST_SEED replays a run.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/failures.bash"
source "$(dirname "$0")/../cases/chaos.bash"
start_containerd 1.7 busybox

failure_cases
chaos_cases "${NUTSHELL_TEST_ROUNDS:-8}" "${NUTSHELL_TEST_SEED:-$((0x$(head -c 3 /dev/urandom | od -An -tx1 | tr -d ' ')))}"
finish
