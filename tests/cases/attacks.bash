# Attacks of containers on the agent, the guest and the host (attacks.pl), on the containerd that the suite has started.
# Sourced by tests/suites/*.sh, after tests/cases/containers.bash.
#
# The cases need the image localhost/debian, which has perl.

attacks=$(<"$cases/attacks.pl")

# assert_attacks_held NUMBER: the output in /run/tmp/out has this number of attacks, and none succeeded.
assert_attacks_held() {
  ! grep BROKEN /run/tmp/out >&2 || return 1
  assert_equal "$1" "$(grep -c '^held ' /run/tmp/out)"
  rm /run/tmp/out
}

# attack_alone NUMBER LEVEL [CTR-OPTION...]: runs these attacks in a new container.
attack_alone() {
  local number=$1 level=$2
  shift 2
  new_name
  nutshell "$name" --rm "$@" -- perl -e "$attacks" "$level" >/run/tmp/out || cat /run/tmp/out >&2
  assert_attacks_held "$number"
}

root_with_default_capabilities_gets_nothing() {
  attack_alone 26 default
}

root_with_the_default_seccomp_profile_gets_nothing() {
  attack_alone 26 default --seccomp --env SECCOMP=1
}

privileged_container_cannot_act_as_the_agent() {
  attack_alone 20 privileged --privileged
}

# start_attack LEVEL: starts these attacks as an exec of container $name, and waits until they are ready.
start_attack() {
  ctr task exec --exec-id attack "$name" perl -e "$attacks" "$1" >/run/tmp/out &
  attack=$!
  wait_for_output ready
}

# attack_without_input LEVEL: runs these attacks as an exec of container $name that has no standard input.
attack_without_input() {
  rm -f /run/tmp/out
  ctr task exec --exec-id "$1" --log-uri file:///run/tmp/out "$name" perl -e "$attacks" "$1" || true
}

exec_inherits_nothing_of_the_agent() {
  new_name
  nutshell "$name" -d -- sleep 1000
  attack_without_input descriptors
  remove "$name"
  assert_attacks_held 2
}

privileged_container_reaches_no_file_of_the_agent() {
  new_name
  nutshell "$name" -d --privileged -- sleep 1000
  attack_without_input handles
  mv /run/tmp/out /run/tmp/handles
  start_attack watch
  ctr task exec --exec-id open "$name" true
  ctr task metrics "$name" >/dev/null
  ctr task kill --exec-id attack --signal SIGUSR1 "$name"
  wait "$attack" || true
  remove "$name"
  cat /run/tmp/handles >>/run/tmp/out
  rm /run/tmp/handles
  assert_attacks_held 2
}

privileged_container_cannot_control_a_starting_exec() {
  new_name
  nutshell "$name" -d --privileged -- sleep 1000
  start_attack hang
  # The exec changes to a directory that answers only when the attack ends.
  local output
  output=$(ctr task exec --exec-id hang --cwd /hang "$name" true 2>&1) || true
  wait "$attack" || true
  remove "$name"
  assert_contains "$output" "chdir to cwd"
  assert_attacks_held 1
}

privileged_container_does_not_choose_programs_of_the_agent() {
  new_name
  nutshell "$name" -d --privileged -- sleep 1000
  start_attack formats
  local output
  output=$(echo 'echo shell of the administrator' | containerd-shim-nutshell-v2 shell "$name" 2>&1) || true
  ctr task kill --exec-id attack --signal SIGUSR1 "$name"
  wait "$attack" || true
  remove "$name"
  assert_equal "shell of the administrator" "$output"
  assert_attacks_held 1
}

attack_cases() {
  snapshotter=overlayfs image=debian
  check "root with the default capabilities gets nothing" root_with_default_capabilities_gets_nothing
  check "root with the default seccomp profile gets nothing" root_with_the_default_seccomp_profile_gets_nothing
  check "exec inherits nothing of the agent" exec_inherits_nothing_of_the_agent
  check "privileged container cannot act as the agent" privileged_container_cannot_act_as_the_agent
  check "privileged container reaches no file of the agent" privileged_container_reaches_no_file_of_the_agent
  check "privileged container cannot control a starting exec" privileged_container_cannot_control_a_starting_exec
  check "privileged container does not choose programs of the agent" \
    privileged_container_does_not_choose_programs_of_the_agent
}
