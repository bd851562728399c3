# Settings of the OCI spec, and the environment that users expect in a container. Sourced after containers.bash. A suite
# calls set_up_containerd and then prepare_specs.
#
# Settings that `ctr run` has no flag for come from a config.json: ctr's default, changed by perl.

# prepare_specs: creates the root file system $root and the default spec.
prepare_specs() {
  root=/run/tmp/rootfs
  mkdir -p $root/{bin,dev,etc,proc,root,run,sys,tmp,data}
  chmod 1777 $root/tmp
  cp "$(type -P busybox)" $root/bin/busybox
  chroot $root /bin/busybox --install -s /bin
  printf 'root:x:0:0:root:/root:/bin/sh\n' >$root/etc/passwd
  ctr oci spec >/run/tmp/default.json
}

# write_spec CHANGE COMMAND...: writes /run/tmp/config.json for container $name. CHANGE is perl code that changes $spec.
write_spec() {
  local change=$1
  shift
  perl -MJSON::PP -e 'my $change = shift; my ($name, $root) = splice @ARGV, 0, 2;
    open my $in, "<", "/run/tmp/default.json"; my $spec = decode_json(join "", <$in>);
    sub true { JSON::PP::true } sub false { JSON::PP::false }
    $spec->{root} = {path => $root}; $spec->{linux}{cgroupsPath} = "/default/$name";
    $spec->{process}{args} = [@ARGV]; $spec->{process}{env} = ["PATH=/bin"]; $spec->{process}{cwd} = "/";
    eval "$change; 1" or die $@; open my $out, ">", "/run/tmp/config.json"; print $out encode_json($spec)' \
    "$change" "$name" "$root" "$@"
}

# run_spec [CTR-OPTION...]: runs container $name with the config.json of write_spec.
run_spec() {
  local status=0
  ctr run --rm --runtime "$runtime" --config /run/tmp/config.json "$@" "$name" || status=$?
  rm -f /run/tmp/config.json
  return "$status"
}

# fails_with TEXT COMMAND...: asserts that the command fails with an error that contains TEXT.
fails_with() {
  local text=$1 output
  shift
  ! output=$("$@" 2>&1) || { echo "did not fail: $*" >&2; return 1; }
  assert_contains "$output" "$text"
}

# A perl function that returns a hook of a spec: hook SCRIPT, FIELD => VALUE...
hook='sub hook { my $script = shift; +{path => "/bin/sh", args => ["sh", "-c", $script], env => ["PATH=/bin:/usr/bin"], @_} }'

# Each hook writes the state that it receives to a file, and its name to /run/tmp/order.
host_hooks_run_in_order_and_receive_the_state() {
  new_name
  write_spec "$hook"'
    for my $moment (qw(prestart createRuntime poststart poststop)) {
      $spec->{hooks}{$moment} = [hook("moment=$moment; " . q{
        cat >/run/tmp/state.$moment; echo $moment >>/run/tmp/order; pid=$(grep -o .pid.:[0-9]* /run/tmp/state.$moment)
        [ -z "$pid" ] || readlink /proc/${pid#*:}/ns/net >>/run/tmp/order})];
    }
    $spec->{annotations} = {colour => "blue"};' sh -c 'ip link | grep -c LOOPBACK'
  assert_equal 1 "$(run_spec)"
  assert_equal "prestart createRuntime poststart poststop" "$(grep -v net: /run/tmp/order | tr '\n' ' ' | sed 's/ $//')"
  # The pid is one of the host, in a network namespace that is not the host's.
  assert_equal 3 "$(grep -c net: /run/tmp/order)"
  ! grep -qF "$(readlink /proc/self/ns/net)" /run/tmp/order || return 1
  local moment status
  for moment in prestart:creating createRuntime:creating poststart:running poststop:stopped; do
    status=${moment#*:}
    assert_equal "$name $status blue true" "$(hook_state "${moment%:*}")"
  done
  rm /run/tmp/order /run/tmp/state.*
}

# hook_state MOMENT: prints id, status and an annotation of the state that the hook received, and whether its bundle is
# this container's.
hook_state() {
  perl -MJSON::PP -e '$state = decode_json(<STDIN>);
    print join " ", @$state{qw(id status)}, $state->{annotations}{colour}, $state->{bundle} =~ m{/\Q$state->{id}\E$} ? "true" : "false"' \
    <"/run/tmp/state.$1"
}

failing_host_hook_fails_create() {
  new_name
  write_spec "$hook"'$spec->{hooks}{createRuntime} = [hook("exit 0"), hook("echo no network >&2; echo half; exit 3")]' true
  fails_with 'error running createRuntime hook #1: exit status 3, stdout: half, stderr: no network' run_spec
  new_name
  write_spec "$hook"'$spec->{hooks}{prestart} = [hook("sleep 1000", timeout => 1)]' true
  fails_with 'error running prestart hook #0: hook ran past specified timeout of 1.0s' run_spec
  new_name
  write_spec '$spec->{hooks}{prestart} = [{path => "/no/such/hook"}]' true
  fails_with 'error running prestart hook #0: fork/exec /no/such/hook: no such file or directory' run_spec
  ! pgrep -f 'sleep 1000'
}

# These hooks run in the container's namespaces, so their programs are the image's.
guest_hooks_run_in_the_container() {
  new_name
  write_spec "$hook"'
    $spec->{hooks}{createContainer} = [hook("cat >/tmp/state; hostname >/tmp/create; pwd >>/tmp/create")];
    $spec->{hooks}{startContainer} = [hook("echo start >>/tmp/create")];
    $spec->{hostname} = "hooked";
    push @{$spec->{mounts}}, {destination => "/tmp", type => "tmpfs", source => "tmpfs"};' \
    sh -c 'cat /tmp/create; cat /tmp/state'
  local output
  output=$(run_spec)
  assert_contains "$output" "hooked
/
start"
  assert_contains "$output" "\"id\":\"$name\""
  assert_contains "$output" '"status":"creating"'
}

failing_guest_hook_fails_create_or_start() {
  new_name
  write_spec "$hook"'$spec->{hooks}{createContainer} = [hook("echo out; echo broken >&2; exit 4")]' true
  fails_with 'error running createContainer hook #0: exit status 4, stdout: out, stderr: broken' run_spec
  new_name
  write_spec "$hook"'$spec->{hooks}{startContainer} = [hook("kill -9 \$\$")]' true
  fails_with 'error running startContainer hook #0: signal: killed, stdout: , stderr:' run_spec
  new_name
  write_spec "$hook"'$spec->{hooks}{startContainer} = [hook("sleep 1000", timeout => 1)]' true
  fails_with 'error running startContainer hook #0: hook ran past specified timeout of 1.0s' run_spec
}

process_has_the_settings_of_the_spec() {
  new_name
  write_spec '
    $spec->{process}{rlimits} = [{type => "RLIMIT_NOFILE", soft => 77, hard => 88}, {type => "RLIMIT_CORE", soft => 0, hard => 0}];
    $spec->{process}{oomScoreAdj} = 321;
    $spec->{process}{user} = {uid => 5, gid => 6, additionalGids => [7, 8], umask => 027};
    $spec->{process}{ioPriority} = {class => "IOPRIO_CLASS_BE", priority => 6};
    $spec->{process}{scheduler} = {policy => "SCHED_BATCH", nice => 3};
    $spec->{linux}{rootfsPropagation} = "shared";
    $spec->{root}{readonly} = true;' \
    sh -c 'ulimit -n; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj; umask; id -u; id -g; id -G
      ionice -p $$; cut -d" " -f19,41 /proc/self/stat; grep -c "^[^ ]* [^ ]* [^ ]* / / .*shared:" /proc/self/mountinfo
      touch /x 2>&1'
  assert_equal "77
88
0
321
0027
5
6
6 7 8
best-effort: prio 6
3 3
1
touch: /x: Read-only file system" "$(run_spec || true)"
}

terminal_has_the_size_of_the_spec() {
  new_name
  write_spec '$spec->{process}{terminal} = true; $spec->{process}{consoleSize} = {height => 33, width => 77}' sleep 1000
  # Detached: otherwise ctr would resize the terminal to that of script(1).
  script -qec "ctr run -d --tty --runtime $runtime --config /run/tmp/config.json $name" /dev/null </dev/null
  assert_equal "33 77" "$(ctr task exec --exec-id one "$name" stty -F /dev/console size)"
  rm /run/tmp/config.json
  remove "$name"
}

cgroup_and_time_namespaces_are_created() {
  new_name
  write_spec '
    push @{$spec->{linux}{namespaces}}, {type => "cgroup"}, {type => "time"};
    $spec->{linux}{timeOffsets} = {boottime => {secs => 864000, nanosecs => 0}, monotonic => {secs => 864000, nanosecs => 0}};' \
    sh -c 'cat /proc/self/cgroup; cut -d. -f1 /proc/uptime'
  local output
  output=$(run_spec)
  assert_contains "$output" "0::/"
  ((${output##*$'\n'} >= 864000)) || { echo "uptime: $output" >&2; return 1; }
}

devices_of_the_guest_are_available_and_others_refused() {
  new_name
  local output node made=()
  # ctr reads the device numbers from nodes on the host; the lab's kernel does not have all of them.
  for node in fuse:10:229 net/tun:10:200 loop-control:10:237; do
    IFS=: read -r node major minor <<<"$node"
    [[ -e /dev/$node ]] || { mkdir -p "$(dirname "/dev/$node")"; mknod "/dev/$node" c "$major" "$minor"; made+=("/dev/$node"); }
  done
  output=$(nutshell "$name" --rm --device /dev/fuse --device /dev/net/tun --device /dev/loop-control -- sh -c '
    for device in null zero full random urandom tty; do test -c /dev/$device || echo no $device; done
    for device in fuse net/tun loop-control; do (: <>/dev/$device) 2>&1 && echo $device; done')
  assert_equal "fuse net/tun loop-control" "$(echo $output)"
  rm -f "${made[@]}"
  new_name
  fails_with /dev/kvm nutshell "$name" --rm --device /dev/kvm -- true
}

user_namespace_maps_root() {
  new_name
  local output
  output=$(nutshell "$name" --rm --uidmap 0:100000:65536 --gidmap 0:100000:65536 --memory-limit $((64 << 20)) \
    --mount type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro -- sh -c '
    id -u; id -g; cat /proc/self/uid_map; stat -c %u:%g /etc/passwd; echo x >/new && stat -c %u:%g /new
    ls -d /sys/kernel /dev/shm; : >/dev/null && cat /sys/fs/cgroup/memory.max')
  assert_equal "0 0 0 100000 65536 0:0 0:0 /dev/shm /sys/kernel $((64 << 20))" "$(echo $output)"
  new_name
  nutshell "$name" -d --uidmap 0:100000:65536 --gidmap 0:100000:65536 -- sleep 1000
  assert_equal "0 0 100000 65536" "$(echo $(ctr task exec --exec-id one "$name" sh -c 'id -u; cat /proc/self/uid_map'))"
  remove "$name"
}

# The tmpfs has the files also if a volume is below the folder, and in a user namespace.
tmpfs_has_the_files_of_its_folder() {
  local output user
  mkdir -p /run/tmp/volume/sub
  echo volume >/run/tmp/volume/sub/file
  for user in '' "push @{\$spec->{linux}{namespaces}}, {type => 'user'};
    \$spec->{linux}{\$_} = [{containerID => 0, hostID => 100000, size => 65536}] for qw(uidMappings gidMappings);"; do
    new_name
    write_spec "$user"'push @{$spec->{mounts}},
      {destination => "/etc", type => "tmpfs", source => "tmpfs", options => [qw(nosuid tmpcopyup size=1m mode=755)]},
      {destination => "/data", type => "bind", source => "/run/tmp/volume", options => ["rbind"]},
      {destination => "/data/sub", type => "tmpfs", source => "tmpfs", options => [qw(tmpcopyup ro)]};' sh -c '
      cat /etc/passwd /data/sub/file; echo new >/etc/new; stat -f -c %T /etc /data/sub; stat -c %u:%a /etc
      (echo new >/data/sub/new) 2>&1 | grep -o "Read-only file system"; grep -c " /data/sub tmpfs ro" /proc/mounts'
    output=$(run_spec)
    assert_equal "root:x:0:0:root:/root:/bin/sh volume tmpfs tmpfs 0:755 Read-only file system 1" "$(echo $output)"
    [[ ! -e $root/etc/new ]]
  done
  new_name
  write_spec 'push @{$spec->{mounts}}, {destination => "/etc", type => "tmpfs", source => "tmpfs",
    options => [qw(tmpcopyup size=4k nr_inodes=1)]}' true
  fails_with "tmpcopyup: copy /etc to a tmpfs: passwd: No space left on device" run_spec
  rm -r /run/tmp/volume
}

# The host maps the mount, if the file system supports it, as ext4 does.
mounts_are_id_mapped() {
  truncate -s 16M /run/tmp/disk
  mkfs.ext4 -q /run/tmp/disk
  mkdir /run/tmp/volume
  mount /run/tmp/disk /run/tmp/volume
  echo host >/run/tmp/volume/file
  new_name
  local map='[{containerID => 0, hostID => 100000, size => 65536}]'
  write_spec '
    $spec->{linux}{uidMappings} = $spec->{linux}{gidMappings} = '"$map"';
    push @{$spec->{linux}{namespaces}}, {type => "user"};
    push @{$spec->{mounts}}, {destination => "/data", type => "bind", source => "/run/tmp/volume", options => ["rbind"],
      uidMappings => '"$map"', gidMappings => '"$map"'}' \
    sh -c 'stat -c %u:%g /data/file; echo guest >/data/new; stat -c %u:%g /data/new; id -u'
  assert_equal "0:0 0:0 0" "$(echo $(run_spec))"
  assert_equal 0:0 "$(stat -c %u:%g /run/tmp/volume/new)"
  umount /run/tmp/volume
  rm /run/tmp/disk
  rmdir /run/tmp/volume
}

mount_that_cannot_be_id_mapped_is_named() {
  new_name
  local map='[{containerID => 0, hostID => 100000, size => 65536}]'
  # An overlay cannot be id-mapped, only its layers, and the lab's root is an overlay.
  write_spec 'push @{$spec->{mounts}}, {destination => "/data", type => "bind", source => "/usr/share", options => ["rbind"],
      uidMappings => '"$map"', gidMappings => '"$map"'}' true
  fails_with "share /usr/share with the machine" run_spec
}

unsupported_fields_are_named() {
  local change field
  while read -r field change; do
    new_name
    write_spec "$change" true
    fails_with "$field" run_spec
  done <<'IN'
linux.resources.hugepageLimits $spec->{linux}{resources}{hugepageLimits} = [{pageSize => "2MB", limit => 2097152}]
linux.seccomp.listenerPath $spec->{linux}{seccomp} = {defaultAction => "SCMP_ACT_ALLOW", listenerPath => "/run/x"}
/the/destination push @{$spec->{mounts}}, {destination => "/the/destination", type => "ext4", source => "/dev/sdb"}
IN
  new_name
  write_spec '$spec->{process}{apparmorProfile} = "cri"; $spec->{process}{selinuxLabel} = "a:b:c"; $spec->{linux}{intelRdt} = {closID => "x"}' true
  run_spec
  for field in process.apparmorProfile process.selinuxLabel linux.intelRdt; do
    grep -q "$field.*is not applied" /run/containerd.log || { echo "no warning of $field" >&2; return 1; }
  done
}

machine_has_the_requested_cpus_and_memory() {
  local cpus output total
  # More vCPUs than the lab machine has CPUs.
  printf '[machine]\nmax_vcpus = 4\n' >/run/tmp/nutshell.toml
  for cpus in 1 2 4; do
    new_name
    output=$(nutshell "$name" --rm --runtime-config-path /run/tmp/nutshell.toml --cpus $cpus --memory-limit $((256 << 20)) -- sh -c \
      'nproc; grep -c ^processor /proc/cpuinfo; sed -n "s/MemTotal: *\([0-9]*\) kB/\1/p" /proc/meminfo')
    assert_equal "$cpus $cpus" "$(echo $output | cut -d' ' -f1,2)"
    total=${output##*$'\n'}
    ((total >= 256 << 10 && total < 350 << 10)) || { echo "MemTotal: $total kB" >&2; return 1; }
  done
  rm /run/tmp/nutshell.toml
}

dev_shm_has_the_requested_size() {
  new_name
  assert_equal 65536 "$(nutshell "$name" --rm -- df -k /dev/shm | awk 'NR == 2 { print $2 }')"
  new_name
  write_spec 'for (@{$spec->{mounts}}) { $_->{options} = [qw(nosuid noexec nodev mode=1777 size=12345k)] if $_->{destination} eq "/dev/shm" }' \
    df -k /dev/shm
  assert_equal 12348 "$(run_spec | awk 'NR == 2 { print $2 }')"
}

kernel_log_requires_cap_syslog() {
  new_name
  fails_with "klogctl: Operation not permitted" nutshell "$name" --rm -- dmesg
  new_name
  assert_contains "$(nutshell "$name" --rm --cap-add CAP_SYSLOG -- dmesg)" "Linux version"
}

# Answers each line of input with the time in seconds.
clock='import sys, time
for line in sys.stdin: print(repr(time.time()), flush=True)'

# ask_clock IN OUT: asserts that the guest's clock is within 1 ms of the host's clock before and after the question.
# With a TSC clocksource on the host, KVM gives the host's clock to the guest with a precision of microseconds. With
# another one the guest gets the time by a message, and the tolerance is 25 ms.
ask_clock() {
  local tolerance=0.025
  [[ $(</sys/devices/system/clocksource/clocksource0/current_clocksource) != tsc ]] || tolerance=0.001
  perl -MTime::HiRes=time -e '$| = 1; my $best;
    for (1..20) {
      my $before = time; print "?\n"; my $guest = <STDIN>; my $after = time;
      die "no answer" unless defined $guest;
      die sprintf "guest is at %.6f, host between %.6f and %.6f", $guest, $before, $after
        if $guest < $before - $ARGV[0] || $guest > $after + $ARGV[0];
      $best = $after - $before if !defined $best || $after - $before < $best;
    }
    printf STDERR "the quickest answer took %.3f ms\n", $best * 1000;' "$tolerance" <&"$1" >&"$2"
}

guest_clock_follows_the_hosts_clock() {
  new_name
  coproc nutshell "$name" --rm -- python3 -c "$clock"
  local client=$COPROC_PID in=${COPROC[1]} out=${COPROC[0]}
  ask_clock "$out" "$in"
  # Simulates a suspend of the host.
  local vmm
  vmm=$(pids_of vmm)
  kill -STOP "$vmm"
  read -r -t 3 -u "$never" || true
  kill -CONT "$vmm"
  ask_clock "$out" "$in"
  # Simulates a suspend that KVM's clock does not count: the host's clock jumps. The guest is informed after the jump,
  # hence the retries.
  date -s '+100 seconds' >/dev/null
  local try
  for try in {1..50}; do
    ! ask_clock "$out" "$in" 2>/dev/null || break
  done
  date -s '-100 seconds' >/dev/null
  ((try < 50)) || { echo "the guest does not follow the host's clock" >&2; return 1; }
  exec {in}>&-
  wait "$client"
}

# follow_slews IN OUT: slews the host's clock by 1 % in both directions for some seconds each, and compares the guest's
# clock with it all the time. A guest's time is wrong if it is more than 5 ms outside of the host's times before and
# after the question, however long the answer takes. A clock that does not follow is 35 ms off at the end of a slew;
# answers within 10 ms are quick enough to find that.
follow_slews() {
  perl -MTime::HiRes=time -e '$| = 1;
    # struct timex on x86-64: modes, padding, three longs, status, padding, ..., tick at byte 88.
    sub set_tick {
      my $timex = pack("x208");
      substr($timex, 0, 4) = pack("L", 0x4000);
      substr($timex, 88, 8) = pack("q", $_[0]);
      die "adjtimex: $!" if syscall(159, $timex) < 0;
    }
    sub ask { print "?\n"; my $guest = <STDIN>; die "no answer" unless defined $guest; $guest }
    END { my $status = $?; set_tick(10000); $? = $status }
    # The first answer takes as long as the interpreter takes to start.
    my $last = ask;
    for my $phase ([10000, 0.5], [10100, 3.5], [10000, 1.5], [9900, 3.5], [10000, 1.5]) {
      my ($tick, $seconds) = @$phase;
      set_tick($tick);
      my ($start, $asked, $quick, $least, $most) = (time, 0, 0, 0, 0);
      while (time < $start + $seconds || $quick < 10) {
        die "tick $tick: only $quick of $asked answers took less than 10 ms" if time > $start + 30;
        my $before = time; my $guest = ask; my $after = time;
        die sprintf "tick %d: guest is at %.6f, host between %.6f and %.6f", $tick, $guest, $before, $after
          if $guest < $before - 0.005 || $guest > $after + 0.005;
        die sprintf "tick %d: the clock of the guest went back from %.6f to %.6f", $tick, $last, $guest if $guest < $last;
        $last = $guest;
        $asked++;
        $quick++ if $after - $before < 0.01;
        $least = $guest - $before if $guest - $before < $least;
        $most = $guest - $after if $guest - $after > $most;
      }
      printf STDERR "tick %d: %d of %d answers within 10 ms; the guest was at least %.1f ms late, %.1f ms ahead\n",
        $tick, $quick, $asked, -$least * 1000, $most * 1000;
    }' <&"$1" >&"$2"
}

guest_clock_follows_slews_of_the_hosts_clock() {
  new_name
  coproc nutshell "$name" --rm -- python3 -c "$clock"
  local client=$COPROC_PID in=${COPROC[1]} out=${COPROC[0]}
  follow_slews "$out" "$in"
  exec {in}>&-
  wait "$client"
}

entropy_is_available_at_once() {
  new_name
  assert_equal "16 16" "$(nutshell "$name" --rm -- python3 -c \
    'import os; print(len(os.getrandom(16, os.GRND_NONBLOCK)), len(os.getrandom(16, os.GRND_NONBLOCK | os.GRND_RANDOM)))')"
}

names_resolve_and_a_missing_locale_is_no_error() {
  new_name
  local output
  output=$(nutshell "$name" --rm -- sh -c 'getent passwd root | cut -d: -f1,3-; getent group root | cut -d: -f1,3-; locale 2>&1 | head -n 1; printf "b\na\n" | LC_ALL=en_US.UTF-8 sort 2>&1 | tail -n 1')
  assert_equal "root:0:0:root:/root:/bin/bash root:0: LANG= b" "$(echo $output)"
}

# Orphans of execs become children of the container's first process, a shell, which reaps them.
orphans_are_reaped() {
  new_name
  nutshell "$name" -d -- sh -c 'while :; do sleep 0.1; done'
  local number
  for number in 1 2 3; do
    ctr task exec --exec-id "orphan$number" "$name" sh -c '(sh -c "sleep 0.2 & exec true") ; exit 0'
  done
  local try
  for try in {1..50}; do
    [[ -n $(ctr task exec --exec-id "look$try" "$name" sh -c 'grep -l "^State:.Z" /proc/[0-9]*/status 2>/dev/null') ]] || break
  done
  ((try < 50))
  remove "$name"
}

oom_event_precedes_the_exit() {
  new_name
  # The memory is used up only after `listen` has seen events.
  nutshell "$name" -d --memory-limit $((32 << 20)) -- sh -c 'while ! test -e /tmp/go; do sleep 0.1; done; exec tail /dev/zero'
  listen "$name"
  ctr task exec --exec-id go "$name" touch /tmp/go
  wait_for_output "/tasks/exit.*\"id\":\"$name\""
  kill "$listener"
  wait "$listener" || true
  assert_contains "$(grep "/tasks/exit.*\"id\":\"$name\"" /run/tmp/out)" '"exit_status":137'
  assert_equal "/tasks/oom /tasks/exit" "$(echo $(grep -o -e /tasks/oom -e "/tasks/exit.*\"id\":\"$name\"" /run/tmp/out | sed 's/exit.*/exit/'))"
  rm /run/tmp/out
  remove "$name"
}

# The only limit is the machine's memory: the machine and its other processes continue to run.
process_that_uses_all_memory_is_killed_alone() {
  new_name
  nutshell "$name" -d -- sleep 1000
  assert_status 137 ctr task exec --exec-id hog "$name" sh -c 'echo 1000 >/proc/self/oom_score_adj; exec tail /dev/zero'
  assert_equal alive "$(ctr task exec --exec-id after "$name" echo alive)"
  assert_contains "$(ctr task ls)" RUNNING
  remove "$name"
}

metrics_are_complete() {
  new_name
  nutshell "$name" -d --memory-limit $((64 << 20)) --cpus 1 -- sh -c 'dd if=/dev/zero of=/dev/shm/part bs=1M count=8 2>/dev/null; mv /dev/shm/part /dev/shm/file; exec sleep 1000'
  local try
  for try in {1..50}; do
    [[ -z $(ctr task exec --exec-id "try$try" "$name" sh -c 'test -e /dev/shm/file && echo ready') ]] || break
  done
  ctr task metrics --format json "$name" >/run/tmp/metrics
  perl -MJSON::PP -e '$m = decode_json(join "", <STDIN>); 
    die "memory" unless $m->{memory}{usage} > 8 << 20 && $m->{memory}{usage_limit} == 64 << 20;
    die "cpu" unless $m->{cpu}{usage_usec} > 0 && $m->{cpu}{user_usec} + $m->{cpu}{system_usec} > 0;
    die "pids" unless $m->{pids}{current} == 1; die "events" unless exists $m->{memory_events}' </run/tmp/metrics || {
    cat /run/tmp/metrics >&2
    return 1
  }
  rm /run/tmp/metrics
  remove "$name"
}

# What a volume cannot do is listed in README.md, "Limits".
volume_behaves_as_a_local_file_system_but_for_the_known_limits() {
  truncate -s 300M /run/tmp/image
  mkfs.ext4 -q -b 4096 /run/tmp/image
  run_file_cases '' -o loop /run/tmp/image
  assert_equal "unnamed file gets a name: Operation not supported (os error 95)
file capabilities are kept: Operation not supported (os error 95)
device nodes are created: Operation not permitted (os error 1)
67 passed, 3 failed" "$(</run/tmp/out)"
  rm /run/tmp/out /run/tmp/image
}

# Before Linux 6.6, a position in a directory of a tmpfs is the number of an entry.
directory_in_memory_is_emptied_while_it_is_read() {
  run_file_cases "directory is emptied while it is read" -t tmpfs -o size=100m tmpfs
  assert_equal "1 passed, 0 failed" "$(</run/tmp/out)"
  rm /run/tmp/out
}

root_file_system_keeps_file_capabilities_until_a_write() {
  new_name
  mkdir /run/tmp/program
  cp "$NUTSHELL_TEST_FILES" /run/tmp/program/files
  nutshell "$name" --rm --mount type=bind,src=/run/tmp/program,dst=/program,options=rbind:ro -- \
    sh -c 'mkdir /cases && /program/files /cases "file capabilities"' >/run/tmp/out
  assert_equal "1 passed, 0 failed" "$(</run/tmp/out)"
  rm -r /run/tmp/program /run/tmp/out
}

# Each request is one exit, through an I/O port. Creating a file with `>` takes six: look-up, creation, two closes of
# descriptors, release, and the attributes of the directory now and then.
creation_of_files_causes_few_exits() {
  local statistics before after try
  new_name
  mkdir /run/tmp/volume
  mount -t debugfs debugfs /sys/kernel/debug
  nutshell "$name" -d --mount type=bind,src=/run/tmp/volume,dst=/volume,options=rbind:rw -- sh -c '
    until [ -e /volume/begin ]; do sleep 0.1; done
    i=0; while [ $i -lt 200 ]; do : >/volume/$i; i=$((i + 1)); done
    touch /volume/end; sleep 1000'
  statistics=$(echo /sys/kernel/debug/kvm/"$(pids_of vmm)"-*)
  before=($(<"$statistics/mmio_exits") $(<"$statistics/io_exits"))
  touch /run/tmp/volume/begin
  for try in {1..600}; do
    [[ ! -e /run/tmp/volume/end ]] || break
    read -r -t 0.1 -u "$never" || true
  done
  [[ -e /run/tmp/volume/end ]] || { echo "the files are not created" >&2; return 1; }
  after=($(<"$statistics/mmio_exits") $(<"$statistics/io_exits"))
  assert_equal 0 $((after[0] - before[0]))
  ((after[1] - before[1] < 200 * 7)) || { echo "$((after[1] - before[1])) exits for 200 files" >&2; return 1; }
  remove "$name"
  umount /sys/kernel/debug
  rm -r /run/tmp/volume
}

# run_file_cases TEXT MOUNT_ARGUMENT...: mounts a file system and runs the cases of tests/files in it, as a volume, whose
# names contain TEXT. Their output is in /run/tmp/out.
run_file_cases() {
  new_name
  mkdir /run/tmp/disk /run/tmp/program
  cp "$NUTSHELL_TEST_FILES" /run/tmp/program/files
  mount "${@:2}" /run/tmp/disk
  nutshell "$name" --rm --mount type=bind,src=/run/tmp/disk,dst=/volume,options=rbind:rw \
    --mount type=bind,src=/run/tmp/program,dst=/program,options=rbind:ro -- \
    sh -c 'mkdir /volume/cases && /program/files /volume/cases "$1"' sh "$1" >/run/tmp/out 2>&1 || true
  umount /run/tmp/disk
  rm -r /run/tmp/disk /run/tmp/program
}
