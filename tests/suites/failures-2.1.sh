#!/usr/bin/env bash
# Failures around containers, and random kills at random moments (chaos). On containerd 2.1.
#
# Environment:
#   NUTSHELL_TEST_ROUNDS  number of rounds of random kills, default 8
#   NUTSHELL_TEST_SEED    seed of the random kills, which a run prints; default: random
#   NUTSHELL_TEST_DISTURBANCES  if set, some rounds disturb the host: a frozen volume, a slewed clock, busy processors
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/failures.bash"
source "$(dirname "$0")/../cases/chaos.bash"
set_up_containerd 2.1 busybox

failure_cases
hung_volume_cases
chaos_cases "${NUTSHELL_TEST_ROUNDS:-8}" "${NUTSHELL_TEST_SEED:-$((0x$(head -c 3 /dev/urandom | od -An -tx1 | tr -d ' ')))}"
finish
