# Attacks of a container on the agent, on the guest and on the host. tests/cases/attacks.bash passes this program to
# `perl -e` in a container, with one of these arguments:
#
#   default      as root with the default capabilities of ctr: all attacks that need no action of the test meanwhile
#   privileged   as root of a privileged container: what must not work even then, and what it is known to be able to do
#   descriptors  as an exec without standard input: the descriptors that it has inherited
#   handles      the same in a privileged container: what can be opened by means of these descriptors
#   watch        privileged: the files that the agent opens while it starts an exec
#   hang         privileged: an exec that is still the agent's process, because it waits for the container's file system
#   formats      privileged: a format of programs that applies to every ELF file
#
# Prints a line "held NAME" for each attack that fails, and "BROKEN NAME: WHY" for each that succeeds. The last three
# print "ready" when they wait for the test. The exit status is 1 if an attack succeeded.
use strict;
use warnings;
use Errno qw(:POSIX);
use Fcntl qw(O_RDONLY O_RDWR O_WRONLY S_IFBLK S_IFCHR);
use Socket;

my $level = shift;
$SIG{ALRM} = sub { die "no answer after 60 s\n" };
alarm 60;
$| = 1;

# Numbers of x86-64.
my %call = (ptrace => 101, syslog => 103, iopl => 172, pivot_root => 155, mount => 165, umount2 => 166, swapon => 167,
  reboot => 169, sethostname => 170, init_module => 175, clock_settime => 227, kexec_load => 246, keyctl => 250,
  openat => 257, mknodat => 259, unshare => 272, perf_event_open => 298, fanotify_init => 300, fanotify_mark => 301,
  name_to_handle_at => 303, open_by_handle_at => 304, setns => 308, process_vm_readv => 310, bpf => 321,
  pidfd_open => 434, pidfd_getfd => 438);
my ($AT_FDCWD, $O_PATH, $O_DIRECTORY) = (-100, 010000000, 0200000);
my ($AF_VSOCK, $HOST_CID) = (40, 2);

# Calls the kernel. Strings are passed as pointers to copies.
sub call {
  my ($name, @arguments) = @_;
  return syscall $call{$name}, @arguments;
}

# Dies unless a call fails. Only these errors are expected.
sub call_fails {
  my ($errors, $name, @arguments) = @_;
  call($name, @arguments) < 0 or die "$name succeeds\n";
  grep { $! == $_ } @$errors or die "$name: $!\n";
}

# Dies if a file can be opened like this, or not because of one of these errors.
sub open_fails {
  my ($errors, $path, $flags) = @_;
  sysopen my $file, $path, $flags or (grep { $! == $_ } @$errors) ? return : die "$path: $!\n";
  die "$path can be opened\n";
}

# Dies if a file can be written.
sub write_fails {
  my ($errors, $path, $text) = @_;
  if (sysopen my $file, $path, O_WRONLY) {
    defined syswrite $file, $text and die "$path can be written\n";
  }
  grep { $! == $_ } @$errors or die "$path: $!\n";
}

sub contents {
  my $path = shift;
  open my $file, '<', $path or die "$path: $!\n";
  local $/;
  return <$file> // '';
}

# As numbers: `syscall` passes strings as pointers.
sub pids { return map { m{(\d+)$} ? $1 + 0 : () } glob '/proc/[0-9]*' }

# The address of a port for AF_VSOCK (vsock(7)).
sub vsock_address { return pack 'SSLLx4', $AF_VSOCK, 0, @_ }

# Runs code in a child with a changed context, and dies with its error.
sub in_child {
  my $code = shift;
  pipe my $reader, my $writer or die "pipe: $!\n";
  my $pid = fork // die "fork: $!\n";
  if (!$pid) {
    eval { $code->(); 1 } or print {$writer} $@;
    close $writer;
    require POSIX;
    POSIX::_exit(0);
  }
  close $writer;
  my $error = join '', <$reader>;
  waitpid $pid, 0;
  die $error if $error;
}

sub no_vsock_sockets {
  for my $type (SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM | 04000) {
    for my $protocol (0, $AF_VSOCK) {
      !socket my $socket, $AF_VSOCK, $type, $protocol or die "a socket of type $type can be created\n";
      # The default seccomp profile fails such a call with EPERM.
      $! == EAFNOSUPPORT || $ENV{SECCOMP} && $! == EPERM or die "socket: $!\n";
    }
  }
  !socketpair my $one, my $other, $AF_VSOCK, SOCK_STREAM, 0 or die "a pair of sockets can be created\n";
}

sub no_way_to_the_root_of_the_guest {
  for my $path ('/proc/1/root', '/proc/self/root', '/proc/1/cwd/../../..', '/..', '/proc/1/root/../../..') {
    my ($own, $found) = (join(' ', (stat '/')[0, 1]), join(' ', (stat $path)[0, 1]));
    $own eq $found or die "$path is another directory than /\n";
    !-e "$path/run/nutshell" or die "$path/run/nutshell exists\n";
  }
}

# The devices of the guest, as "KIND MAJOR MINOR".
sub devices {
  my @found;
  for my $link (glob '/sys/dev/char/* /sys/dev/block/*') {
    my ($kind, $major, $minor) = $link =~ m{/(char|block)/(\d+):(\d+)$} or next;
    push @found, [$kind, $major, $minor];
  }
  @found > 5 or die "there are only " . @found . " devices in /sys/dev\n";
  return @found;
}

# Makes the node of a device in /dev, a tmpfs, and tries to open it. Returns whether that works.
sub opens_device {
  my ($kind, $major, $minor) = @_;
  my $node = "/dev/attack-$$";
  my $mode = ($kind eq 'block' ? S_IFBLK : S_IFCHR) | 0600;
  call('mknodat', $AT_FDCWD, $node, $mode, ($major & 0xfff) << 8 | $minor & 0xff | ($minor & ~0xff) << 12) == 0
    or return 0;
  my $opened = sysopen my $device, $node, O_RDONLY | 04000;
  my $error = $!;
  unlink $node;
  $! = $error;
  return $opened ? 1 : 0;
}

sub own_descriptors {
  opendir my $directory, '/proc/self/fd' or die "/proc/self/fd: $!\n";
  my $own = fileno $directory;
  return grep { /^\d+$/ && $_ != $own } readdir $directory;
}

# The attacks that must fail in every container.
my @always = (
  'sockets of AF_VSOCK' => \&no_vsock_sockets,
  'sockets of AF_VSOCK in a child' => sub { in_child(\&no_vsock_sockets) },
  'sockets of AF_VSOCK from other families' => sub {
    for my $family (AF_INET, AF_UNIX, AF_INET6) {
      socket my $socket, $family, SOCK_STREAM, 0 or die "socket: $!\n";
      !setsockopt $socket, SOL_SOCKET, 39, pack 'i', $AF_VSOCK or die "SO_DOMAIN can be set\n";
      for my $port (1, 512, 1023, 1024, 1025, 5000) {
        !connect $socket, vsock_address($port, $HOST_CID) or die "port $port of the host accepts\n";
        !bind $socket, vsock_address($port, 0xffffffff) or die "port $port can be bound\n";
      }
    }
  },
  'list of AF_VSOCK sockets' => sub {
    !-e '/proc/net/vsock' or die "/proc/net/vsock exists\n";
    if (socket my $socket, 16, SOCK_RAW, 4) {
      # SOCK_DIAG_BY_FAMILY with a struct vsock_diag_req (linux/vm_sockets_diag.h).
      send $socket, pack('LSSLL CCSL5', 40, 20, 0x301, 1, 0, $AF_VSOCK, 0, 0, 0xffffffff, (0) x 4), 0;
      recv $socket, my $reply, 8192, 0;
      my (undef, $type, undef, undef, undef, $error) = unpack 'LSSLLl', $reply;
      $type == 2 && $error < 0 or die "the kernel lists them\n";
    }
  },
  'processes of the agent in /proc' => sub {
    for my $pid (pids()) {
      my $program = readlink("/proc/$pid/exe") // '';
      $program =~ m{^(/usr)?/bin/} or $program eq '' or die "pid $pid is $program\n";
    }
    contents('/proc/1/status') =~ /^NSpid:\t1$/m or die "the pid namespace has a parent in /proc\n";
  },
  'ptrace of other processes' => sub {
    for my $pid (2 .. 400) {
      next if -e "/proc/$pid";
      call_fails([ESRCH], 'ptrace', 16, $pid, 0, 0);
      call_fails([ESRCH], 'process_vm_readv', $pid, pack('QQ', 4096, 1), 1, pack('QQ', 4096, 1), 1, 0);
      call_fails([ESRCH], 'pidfd_open', $pid, 0);
    }
  },
  'signals to all processes' => sub {
    # Pid 1 of the namespace does not get them. If they reached the agent, the container would end with the machine.
    in_child(sub {
      $SIG{$_} = 'IGNORE' for qw(TERM HUP INT);
      kill $_, -1 for qw(TERM HUP INT);
      kill 'KILL', 1;
    });
    kill 'KILL', 1;
  },
  'parent namespaces' => sub {
    for my $name (qw(pid user)) {
      open my $namespace, '<', "/proc/self/ns/$name" or die "/proc/self/ns/$name: $!\n";
      !ioctl $namespace, 0xb702, 0 or die "the parent of the $name namespace can be opened\n";
      $! == EPERM or die "NS_GET_PARENT: $!\n";
    }
  },
  'mount namespace of the agent' => sub {
    open my $namespace, '<', '/proc/self/ns/mnt' or die "/proc/self/ns/mnt: $!\n";
    # NS_MNT_GET_NEXT and NS_MNT_GET_PREV, with a struct mnt_ns_info.
    for my $request (0x8010b70b, 0x8010b70c) {
      my $info = pack 'LLQ', 16, 0, 0;
      !ioctl $namespace, $request, $info or die "another mount namespace can be opened\n";
      $! == EPERM || $! == ENOTTY or die "NS_MNT_GET_NEXT: $!\n";
    }
  },
  'root directory of the guest' => \&no_way_to_the_root_of_the_guest,
  'initramfs' => sub {
    call_fails([EPERM, ENODEV], 'mount', 'rootfs', '/tmp', 'rootfs', 0, 0);
  },
  'sockets with a name in the agent\'s network namespace' => sub {
    my @names = contents('/proc/net/unix') =~ /(@\S+)$/mg;
    @names == 0 or die "@names\n";
  },
  'memory of the machine' => sub {
    for my $minor (1, 2, 4) { !opens_device('char', 1, $minor) or die "device 1:$minor can be opened\n" }
    open_fails([ENOENT], '/proc/kcore', O_RDWR) if $level eq 'privileged';
    call_fails([ENOSYS, EPERM], 'iopl', 3);
  },
  'code in the kernel' => sub {
    call_fails([ENOSYS, EPERM], 'init_module', "\0" x 64, 64, '');
    call_fails([ENOSYS, EPERM], 'kexec_load', 0, 0, 0, 0);
  },
);

# The attacks that must fail with the default capabilities.
my @default = (
  'privileges' => sub {
    my %status = contents('/proc/self/status') =~ /^(\w+):\s+(\S+)/mg;
    my $expected = 'a80425fb';
    for my $set (qw(CapEff CapPrm CapBnd)) {
      $status{$set} =~ /^0*$expected$/ or die "$set is $status{$set}\n";
    }
    $status{NoNewPrivs} == 1 or die "NoNewPrivs is $status{NoNewPrivs}\n";
    $status{Seccomp} == ($ENV{SECCOMP} ? 2 : 0) or die "Seccomp is $status{Seccomp}\n";
  },
  'devices of the guest' => sub {
    # Those of runc's default and of containerd's: null, zero, full, random, urandom, tty, console, ptmx, tun, pts.
    my $allowed = qr/^char (1:[35789]|5:[012]|10:200|136:\d+)$/;
    my ($denied, $opened) = (0, 0);
    my @others = (['block', 7, 0], ['block', 254, 0], ['block', 259, 0], ['char', 10, 229], ['char', 1, 11]);
    for my $device (devices(), @others) {
      my ($kind, $major, $minor) = @$device;
      my $opens = opens_device(@$device);
      if ("$kind $major:$minor" =~ $allowed) { $opened += $opens; next }
      !$opens or die "$kind $major:$minor can be opened\n";
      $! == EPERM or die "$kind $major:$minor: $!\n";
      $denied++;
    }
    $denied > 10 && $opened > 4 or die "$denied denied, $opened opened\n";
  },
  '/dev/vsock' => sub {
    my ($major, $minor) = contents('/sys/class/misc/vsock/dev') =~ /(\d+):(\d+)/;
    !opens_device('char', $major, $minor) or die "it can be opened\n";
    $! == EPERM or die "open: $!\n";
  },
  'mounts' => sub {
    call_fails([EPERM], 'mount', 'tmpfs', '/tmp', 'tmpfs', 0, 0);
    call_fails([EPERM], 'mount', 'cgroup2', '/tmp', 'cgroup2', 0, 0);
    call_fails([EPERM], 'mount', 'devtmpfs', '/tmp', 'devtmpfs', 0, 0);
    call_fails([EPERM], 'mount', 'none', '/sys', '', 040, 0);
    call_fails([EPERM], 'umount2', '/proc/keys', 2);
    call_fails([EPERM], 'umount2', '/proc/sys', 2);
    call_fails([EPERM], 'pivot_root', '/tmp', '/tmp');
  },
  'control groups' => sub {
    contents('/proc/self/cgroup') =~ m{^0::/(container-\S+)?$} or die contents('/proc/self/cgroup');
    for my $file (qw(cgroup.procs memory.max pids.max cgroup.kill cgroup.subtree_control)) {
      write_fails([EROFS, ENOENT], "/sys/fs/cgroup/$file", 1);
    }
    !mkdir '/sys/fs/cgroup/new' or die "a control group can be created\n";
  },
  'namespaces' => sub {
    # Of mounts, control groups, names, IPC, pids, network, time.
    for my $flag (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000, 0x80) {
      call_fails([EPERM], 'unshare', $flag);
    }
    for my $name (qw(mnt pid net ipc uts cgroup)) {
      open my $namespace, '<', "/proc/1/ns/$name" or die "/proc/1/ns/$name: $!\n";
      call_fails([EPERM], 'setns', fileno $namespace, 0);
    }
  },
  'kernel parameters' => sub {
    for my $file (qw(kernel/core_pattern kernel/modprobe kernel/sysrq kernel/hostname kernel/panic vm/panic_on_oom
        kernel/ns_last_pid fs/protected_symlinks kernel/poweroff_cmd vm/drop_caches)) {
      write_fails([EROFS, ENOENT], "/proc/sys/$file", 1);
    }
    write_fails([EROFS, ENOENT], '/proc/sysrq-trigger', 'b');
  },
  'sysfs' => sub {
    for my $file ('kernel/uevent_helper', 'power/state', 'kernel/profiling', 'devices/system/cpu/cpu0/online',
      'bus/virtio/drivers_autoprobe', 'bus/platform/drivers/virtio-mmio/unbind', 'kernel/rcu_expedited') {
      write_fails([EROFS, ENOENT], "/sys/$file", 1);
    }
  },
  'masked and read-only paths' => sub {
    for my $path (qw(acpi asound kcore keys latency_stats timer_list timer_stats sched_debug scsi)) {
      my $file = "/proc/$path";
      next if !-e $file;
      my $content = -d $file ? join('', grep { !/^\.\.?$/ } glob "$file/*") : eval { contents($file) } // '';
      $content eq '' or die "$file can be read\n";
    }
    my ($masked) = scalar grep { m{ /proc/(keys|timer_list) } } split /\n/, contents('/proc/self/mountinfo');
    $masked > 0 or die "no path is masked\n";
    for my $path (qw(/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger)) {
      next if !-e $path;
      contents('/proc/self/mountinfo') =~ m{ \Q$path\E ro,}m or die "$path is not read-only\n";
    }
  },
  'privileged system calls' => sub {
    call_fails([EPERM], 'sethostname', 'x', 1);
    call_fails([EPERM], 'clock_settime', 0, pack 'QQ', 0, 0);
    call_fails([EPERM], 'reboot', 0xfee1dead, 672274793, 0, 0);
    call_fails([EPERM], 'syslog', 3, "\0" x 64, 64);
    call_fails([EPERM], 'swapon', '/tmp', 0);
    call_fails([EPERM], 'bpf', 0, pack('L5 x108', 2, 4, 8, 1, 0), 128);
    call_fails([EPERM, EACCES], 'perf_event_open', pack('LLQ x112', 1, 128, 0), -1, 0, -1, 0);
    call_fails([EPERM], 'open_by_handle_at', 0, pack('LlQQ', 8, 1, 1, 1), 0);
    call_fails([EPERM], 'fanotify_init', 0x4, O_RDONLY);
  },
  'system calls that the default seccomp profile forbids' => sub {
    return if !$ENV{SECCOMP};
    call_fails([EPERM], 'unshare', 0x10000000);
    call_fails([EPERM], 'keyctl', 0, -3, 0, 0, 0);
  },
);

# What must not work in a privileged container, which otherwise controls the guest's kernel.
my @privileged = (
  'sockets of AF_VSOCK in new namespaces' => sub {
    # Of users; of pids and mounts; of the network and control groups.
    for my $flags (0x10000000, 0x20000000 | 0x20000, 0x40000000 | 0x2000000) {
      in_child(sub {
        call('unshare', $flags) == 0 or die "unshare: $!\n";
        in_child(\&no_vsock_sockets);
      });
    }
  },
  '/dev/vsock' => sub {
    my ($major, $minor) = contents('/sys/class/misc/vsock/dev') =~ /(\d+):(\d+)/;
    # It can be opened, and tells the address of the machine. It creates no socket.
    opens_device('char', $major, $minor) or die "open: $!\n";
    no_vsock_sockets();
  },
  'programs of the kernel' => sub {
    my $script = '/tmp/helper';
    open my $file, '>', $script or die "$script: $!\n";
    print {$file} "#!/bin/sh\n: >/tmp/helped\n";
    close $file;
    chmod 0755, $script;
    for my $parameter (qw(core_pattern modprobe)) {
      # A kernel without modules has no kernel.modprobe.
      sysopen my $handle, "/proc/sys/kernel/$parameter", O_WRONLY or $parameter eq 'modprobe' ? next : die "open: $!\n";
      syswrite $handle, ($parameter eq 'core_pattern' ? '|' : '') . "/proc/1/root$script" or die "write: $!\n";
    }
    in_child(sub { kill 'SEGV', $$; sleep 10 });
    # Of a module that does not exist.
    socket my $socket, 44, SOCK_STREAM, 0;
    !-e '/tmp/helped' or die "the kernel started a program of the container\n";
    write_fails([ENOENT, EACCES], '/sys/kernel/uevent_helper', $script);
    write_fails([ENOENT, EACCES, EIO], '/proc/sysrq-trigger', 'h');
  },
  'control group of the agent' => sub {
    call('mount', 'cgroup2', '/mnt', 'cgroup2', 0, 0) == 0 or die "mount: $!\n";
    my @agent = grep { $_ ne '' && $_ != 0 } split /\n/, contents('/mnt/cgroup.procs');
    my @own = pids();
    for my $pid (@agent) { grep { $_ == $pid } @own or die "pid $pid of the agent's control group is visible\n" }
    write_fails([ESRCH, EINVAL], '/mnt/cgroup.procs', 500);
    call('umount2', '/mnt', 2);
  },
  'known abilities of a privileged container' => sub {
    call('mount', 'tmpfs', '/mnt', 'tmpfs', 0, 0) == 0 or die "it can no longer mount: $!\n";
    call('umount2', '/mnt', 0);
    call('sethostname', 'guest', 5) == 0 or die "it can no longer set the host name: $!\n";
    opens_device('char', 1, 11) or die "it can no longer open the kernel's log: $!\n";
    call('bpf', 0, pack('L5 x108', 2, 4, 8, 1, 0), 128) > 2 or die "it can no longer create BPF maps: $!\n";
  },
);

# Dies if the root of a file system that the agent has mounted too can be opened by its handle, at the mount of an
# inherited descriptor. If that mount is the agent's, files of the agent outside of it can be reached from there.
sub handle_fails {
  my ($descriptor, $type) = @_;
  call('mount', $type, '/mnt', $type, 0, 0) == 0 or die "mount $type: $!\n";
  my ($path, $handle, $id) = ('/mnt', pack('Ll x128', 128, 0), pack('l', 0));
  # Not by way of `call`, which copies the handle.
  my $named = syscall $call{name_to_handle_at}, $AT_FDCWD, $path, $handle, $id, 0;
  my $error = $!;
  call('umount2', '/mnt', 2);
  $named == 0 or die "name_to_handle_at: $error\n";
  my $directory = call('open_by_handle_at', $descriptor, $handle, O_RDONLY | $O_DIRECTORY);
  return $! if $directory < 0;
  for my $path (qw(.. ../.. ../../..)) {
    for my $file ('proc/1/mem', 'run/nutshell') {
      my $opened = call('openat', $directory, "$path/$file", $file =~ /mem/ ? O_RDWR : O_RDONLY);
      $opened < 0 or die "$path/$file of the agent can be opened\n";
    }
  }
  die "a directory of the agent can be opened\n";
}

sub expect_descriptors {
  my $found = join ' ', sort { $a <=> $b } own_descriptors();
  $found eq '0 1 2' or die "$found\n";
}

# Waits for a process that is not one of these.
sub new_process {
  my %known = map { $_ => 1 } @_;
  while (1) {
    for my $pid (pids()) { return $pid if !$known{$pid} }
    select undef, undef, undef, 0.01;
  }
}

my %scenario = (
  default => [@always, 'inherited descriptors' => \&expect_descriptors, @default],
  privileged => [@always, 'inherited descriptors' => \&expect_descriptors, @privileged],
  descriptors => [
    'inherited descriptors' => \&expect_descriptors,
    'standard input' => sub {
      my @own = stat '/dev/null';
      my @given = stat STDIN;
      "@own[0, 1]" eq "@given[0, 1]" or die "it is not the container's /dev/null\n";
      open my $again, '<', '/proc/self/fd/0' or die "it cannot be opened again: $!\n";
    },
  ],
  handles => ['files of the agent by handles' => sub { handle_fails(0, 'devtmpfs') }],
  watch => [
    'files of the agent by events' => sub {
      my $group = call('fanotify_init', 0x2, O_RDONLY);
      $group >= 0 or die "fanotify_init: $!\n";
      # Of whole file systems, which the agent shares.
      for my $type (qw(devtmpfs cgroup2 sysfs)) {
        call('mount', $type, '/mnt', $type, 0, 0) == 0 or die "mount $type: $!\n";
        # FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_OPEN.
        call('fanotify_mark', $group, 0x101, 0x20, $AT_FDCWD, '/mnt') == 0 or die "fanotify_mark: $!\n";
        call('umount2', '/mnt', 2);
      }
      open my $events, '<&=', $group or die "open: $!\n";
      print "ready\n";
      my ($done, $seen) = (0, 0);
      local $SIG{USR1} = sub { $done = 1 };
      while (!$done) {
        my $ready = '';
        vec($ready, $group, 1) = 1;
        next if select($ready, undef, undef, 0.5) <= 0;
        my $length = sysread $events, my $buffer, 4096;
        if (!defined $length) {
          # The kernel cannot give the listener a descriptor.
          $! == EPERM ? $seen++ : die "read: $!\n";
          next;
        }
        # struct fanotify_event_metadata. A process of another pid namespace has pid 0.
        while (length $buffer >= 24) {
          my ($size, undef, undef, undef, undef, $descriptor, $pid) = unpack 'LCCSQll', $buffer;
          $pid != 0 || $descriptor < 0 or die readlink("/proc/self/fd/$descriptor") . " of the agent is open\n";
          $buffer = substr $buffer, $size;
        }
      }
      $seen > 0 or die "the agent opened no file\n";
    },
  ],
  hang => [
    'process of the agent that starts an exec' => sub {
      call('mknodat', $AT_FDCWD, '/dev/probe-fuse', S_IFCHR | 0600, 10 << 8 | 229) == 0 or die "mknod: $!\n";
      sysopen my $fuse, '/dev/probe-fuse', O_RDWR or die "open: $!\n";
      mkdir '/hang';
      my $options = sprintf 'fd=%d,rootmode=40000,user_id=0,group_id=0', fileno $fuse;
      call('mount', 'none', '/hang', 'fuse', 0, $options) == 0 or die "mount: $!\n";
      my @known = pids();
      print "ready\n";
      my $pid = new_process(@known);
      my $answer = eval {
        call_fails([EPERM], 'ptrace', 16, $pid, 0, 0);
        open_fails([EACCES, EPERM], "/proc/$pid/mem", O_RDWR);
        open_fails([EACCES, EPERM], "/proc/$pid/environ", O_RDONLY);
        open_fails([EACCES, EPERM], "/proc/$pid/exe", O_WRONLY);
        open_fails([EACCES, EPERM], "/proc/$pid/exe", O_RDONLY);
        open_fails([EACCES, EPERM], "/proc/$pid/root/proc/1/mem", O_RDWR);
        !readlink "/proc/$pid/$_" or die "/proc/$pid/$_ can be read\n" for qw(exe root cwd ns/mnt ns/pid);
        # The numbers of the descriptors can be listed.
        !readlink or die "$_ can be read\n" for glob "/proc/$pid/fd/*";
        open_fails([EACCES, EPERM], $_, O_RDONLY) for glob "/proc/$pid/fd/*";
        my $pidfd = call('pidfd_open', $pid, 0);
        $pidfd >= 0 or die "pidfd_open: $!\n";
        call_fails([EPERM], 'pidfd_getfd', $pidfd, $_, 0) for 0 .. 9;
        call_fails([EPERM], 'setns', $pidfd, 0x20000);
        1;
      };
      my $error = $@;
      call('umount2', '/hang', 1);
      $answer or die $error;
    },
  ],
  formats => [
    'format of programs for the agent' => sub {
      call('mount', 'binfmt_misc', '/mnt', 'binfmt_misc', 0, 0) == 0 or die "mount: $!\n";
      # The only static program of the image: it needs no file of the agent.
      open my $register, '>', '/mnt/register' or die "/mnt/register: $!\n";
      # The type of the ELF files that are not relocated, such as BusyBox. The interpreter is another one.
      syswrite $register, ":probe:M:16:\\x02\\x00\\x3e::/sbin/ldconfig:F" or die "register: $!\n";
      my $done = 0;
      local $SIG{USR1} = sub { $done = 1 };
      print "ready\n";
      select undef, undef, undef, 0.1 while !$done;
      open my $entry, '>', '/mnt/probe' or die "/mnt/probe: $!\n";
      syswrite $entry, '-1' or die "remove: $!\n";
    },
  ],
);

my @attacks = @{$scenario{$level // ''} // die "unknown argument\n"};
my $broken = 0;
while (my ($name, $attack) = splice @attacks, 0, 2) {
  if (eval { $attack->(); 1 }) { print "held $name\n" }
  else {
    $broken = 1;
    print "BROKEN $name: $@";
  }
}
exit $broken;
