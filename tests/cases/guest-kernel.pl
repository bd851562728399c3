# Checks in a privileged container that the guest's kernel is what docs/GUEST_KERNEL.md says. tests/cases/containers.bash
# sends this program, followed by that page and a heading "End", to `perl -`. The heading is needed because ctr may lose
# an end of file that it reads before the task has started.
#
# The name of a check is the first column of a row. A check dies if the feature does not work, or if a process of a
# container can use what is closed. Each kernel option in a row must be set, or must not be set in the rows of "What it
# does not have". Prints a line for each row that is wrong, then the number of rows; exits with 1 if one was wrong.
use strict;
use warnings;
use Errno qw(EAFNOSUPPORT EINVAL ENODEV ENOENT ENOSYS);
use Socket;

$SIG{ALRM} = sub { die "no answer after 20 s\n" };
$SIG{PIPE} = 'IGNORE';
$| = 1;
my $loopback = pack_sockaddr_in(0, INADDR_LOOPBACK);
mkdir '/probe' or die "create /probe: $!\n";

# Numbers of x86-64.
my %call = (setrlimit => 160, mount => 165, umount2 => 166, init_module => 175, set_mempolicy => 238,
  get_mempolicy => 239, mknodat => 259, accept4 => 288, bpf => 321, userfaultfd => 323, io_uring_setup => 425,
  landlock_create_ruleset => 444, memfd_secret => 447);

# Strings are passed as pointers to copies.
sub call {
  my ($name, @arguments) = @_;
  my $result = syscall $call{$name}, @arguments;
  die "$name: $!\n" if $result < 0;
  return $result;
}

# call_fails ERRNO NAME ARG...
sub call_fails {
  my ($errno, $name, @arguments) = @_;
  syscall($call{$name}, @arguments) < 0 or die "$name succeeds\n";
  $! == $errno or die "$name: $!\n";
}

sub contents {
  my $file = shift;
  open my $handle, '<', $file or die "$file: $!\n";
  local $/;
  return <$handle> // '';
}

sub write_file {
  my ($file, $text) = @_;
  open my $handle, '>', $file or die "$file: $!\n";
  syswrite($handle, $text) == length $text or die "write $file: $!\n";
}

sub expect {
  my ($expected, $found) = @_;
  $found eq $expected or die "found '$found', expected '$expected'\n";
}

# A socket of any family.
sub open_socket {
  my ($family, $type, $protocol) = @_;
  socket my $socket, $family, $type, $protocol or die "socket: $!\n";
  return $socket;
}

# Returns both ends of a connection over loopback.
sub connected {
  my $protocol = shift;
  my $listener = open_socket(AF_INET, SOCK_STREAM, $protocol);
  bind $listener, $loopback or die "bind: $!\n";
  listen $listener, 1 or die "listen: $!\n";
  my $client = open_socket(AF_INET, SOCK_STREAM, $protocol);
  connect $client, getsockname $listener or die "connect: $!\n";
  accept my $server, $listener or die "accept: $!\n";
  return ($client, $server);
}

sub transfers {
  my ($from, $to) = @_;
  defined send $from, 'hello', 0 or die "send: $!\n";
  defined recv $to, my $text, 100, 0 or die "recv: $!\n";
  expect('hello', $text);
}

# A connection whose protocol number is the requested one at both ends.
sub protocol_transfers {
  my $protocol = shift;
  my ($client, $server) = connected($protocol);
  expect($protocol, unpack 'i', getsockopt $_, SOL_SOCKET, 38) for $client, $server;
  transfers($client, $server);
  transfers($server, $client);
}

# netlink FAMILY, MESSAGE...: sends messages, each a reference to [TYPE, FLAGS, BODY], and dies if one fails.
sub netlink {
  my ($family, @messages) = @_;
  my $socket = open_socket(16, SOCK_RAW, $family);
  my $sequence = 0;
  my $wanted = grep { $$_[1] & 4 } @messages;
  my $bytes = join '', map { pack('LSSLL', 16 + length $$_[2], $$_[0], $$_[1] | 1, ++$sequence, 0) . $$_[2] } @messages;
  send $socket, $bytes, 0, pack('SSLL', 16, 0, 0, 0) or die "send to netlink: $!\n";
  while ($wanted > 0) {
    defined recv $socket, my $reply, 65536, 0 or die "netlink: $!\n";
    my (undef, $type, undef, undef, undef, $error) = unpack 'LSSLLl', $reply;
    $type == 2 or next;
    $! = -$error, die "netlink: $!\n" if $error;
    $wanted--;
  }
}

# A netlink attribute.
sub attribute {
  my ($type, $value) = @_;
  return pack('SS', 4 + length $value, $type) . $value . "\0" x (-length($value) % 4);
}

my $links = 0;

# new_link KIND [DATA [PARENT]]: creates a link and returns its name. DATA are the attributes of this kind of link.
sub new_link {
  my ($kind, $data, $parent) = @_;
  my $name = 'probe' . ++$links;
  my $info = attribute(1, "$kind\0") . (defined $data ? attribute(2, $data) : '');
  my $body = pack('CCSlLL', 0, 0, 0, 0, 0, 0) . attribute(3, "$name\0") . attribute(18, $info);
  $body .= attribute(5, pack 'L', contents("/sys/class/net/$parent/ifindex")) if $parent;
  netlink(0, [16, 0x604, $body]);
  -d "/sys/class/net/$name" or die "there is no link $name\n";
  return $name;
}

my $parent;

# new_child KIND [DATA]: creates a link over another.
sub new_child {
  $parent //= new_link('dummy');
  return new_link(@_[0, 1], $parent);
}

sub knows_file_system {
  my $type = shift;
  contents('/proc/filesystems') =~ /^(?:nodev)?\t\Q$type\E$/m or die "$type is not in /proc/filesystems\n";
}

# A device node in /dev, a tmpfs: there are none in shared root file systems.
sub device {
  my ($name, $major, $minor, $kind) = @_;
  call('mknodat', -100, "/dev/probe-$name", ($kind // 0020000) | 0600, $major << 8 | $minor);
  open my $handle, '+<', "/dev/probe-$name" or die "open $name: $!\n";
  return $handle;
}

# algorithm TYPE NAME KEY [TAG-SIZE]: a socket that runs this algorithm of the kernel.
sub algorithm {
  my ($type, $name, $key, $tag) = @_;
  my $socket = open_socket(38, SOCK_SEQPACKET, 0);
  bind $socket, pack 'Sa14LLa64', 38, $type, 0, 0, $name or die "bind $type $name: $!\n";
  !defined $key or setsockopt $socket, 279, 1, $key or die "set the key: $!\n";
  # The size of the tag is the length of the option, not its value.
  !defined $tag or setsockopt $socket, 279, 5, "\0" x $tag or die "set the size of the tag: $!\n";
  # Without a buffer for the address of the peer, which these sockets do not have.
  my $descriptor = call('accept4', fileno $socket, 0, 0, 0);
  open my $operation, '+<&=', $descriptor or die "open: $!\n";
  return $operation;
}

# Sends hexadecimal input to an algorithm and returns its output. Without a control message, ciphers decrypt.
sub compute {
  my ($operation, $input, $size) = @_;
  defined send $operation, pack('H*', $input), 0 or die "send: $!\n";
  defined sysread($operation, my $output, $size) or die "read: $!\n";
  return unpack 'H*', $output;
}

# The exit status of a program that is written to /probe/program.
sub program_exit {
  write_file('/probe/program', shift);
  chmod 0755, '/probe/program' or die "chmod: $!\n";
  my $output = `/probe/program 2>&1`;
  return ($? >> 8, $output);
}

my %check = (
  'NUMA: one node' => sub {
    contents('/sys/devices/system/node/node0/cpulist') =~ /^0/ or die "node0 has no CPU 0\n";
    contents('/sys/devices/system/node/node0/meminfo') =~ /MemTotal: +[1-9]/ or die "node0 has no memory\n";
    call('set_mempolicy', 2, pack('Q', 1), 64);
    my ($mode, $mask) = (pack('i', 0), pack('Q', 0));
    syscall($call{get_mempolicy}, $mode, $mask, 64, 0, 0) == 0 or die "get_mempolicy: $!\n";
    expect('2 1', join ' ', unpack('i', $mode), unpack('Q', $mask));
    call('set_mempolicy', 0, 0, 0);
  },
  'BPF' => sub {
    my $map = call('bpf', 0, pack('L5 x108', 2, 4, 8, 1, 0), 128);
    $map > 2 or die "no descriptor\n";
  },
  'io_uring' => sub { call('io_uring_setup', 1, "\0" x 120) },
  'userfaultfd' => sub { call('userfaultfd', 0) },
  'Landlock' => sub { call('landlock_create_ruleset', 0, 0, 1) > 0 or die "no version\n" },
  'secret memory' => sub { call('memfd_secret', 0) },
  'binfmt_misc' => sub {
    call('mount', 'binfmt_misc', '/proc/sys/fs/binfmt_misc', 'binfmt_misc', 0, 0);
    write_file('/proc/sys/fs/binfmt_misc/register', ':probe:M::nutshell-probe::/bin/cat:');
    expect('nutshell-probe', (program_exit('nutshell-probe'))[1]);
  },
  '32-bit programs' => sub {
    # _exit(42) by the system call of i386.
    my $code = "\xb8\1\0\0\0\xbb\x2a\0\0\0\xcd\x80";
    my $size = 84 + length $code;
    my ($status) = program_exit(pack('A4C12SSLLLLLSSSSSS', "\x7fELF", 1, 1, 1, (0) x 9, 2, 3, 1, 0x10054, 52, 0, 0, 52,
      32, 1, 0, 0, 0) . pack('L8', 1, 0, 0x10000, 0x10000, $size, $size, 5, 4096) . $code);
    expect(42, $status);
  },
  '/proc/modules' => sub { expect('', contents('/proc/modules')) },
  '/proc/config.gz' => sub { contents('/proc/config.gz') =~ /^\x1f\x8b/ or die "it is not a gzip file\n" },

  'SCTP' => sub { protocol_transfers(132) },
  'MPTCP' => sub { protocol_transfers(262) },
  'AF_ALG: hash' => sub {
    expect('ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad', compute(algorithm('hash', 'sha256'), '616263', 32));
  },
  'AF_ALG: skcipher' => sub {
    # FIPS 197, appendix C.1.
    my $operation = algorithm('skcipher', 'ecb(aes)', pack('H*', '000102030405060708090a0b0c0d0e0f'));
    expect('00112233445566778899aabbccddeeff', compute($operation, '69c4e0d86a7b0430d8cdb78070b4c55a', 16));
    algorithm('skcipher', $_, "\1" x 16 . "\2" x 16) for 'cbc(aes)', 'ctr(aes)', 'xts(aes)';
  },
  'AF_ALG: aead' => sub {
    # Test case 2 of the specification of GCM.
    my $operation = algorithm('aead', 'gcm(aes)', "\0" x 16, 16);
    my $input = '0388dace60b6a392f328c2b971b2fe78' . 'ab6e47d42cec13bdf53a67b21257bddf';
    expect('00' x 16, compute($operation, $input, 16));
    algorithm('aead', 'rfc7539(chacha20,poly1305)', "\1" x 32);
  },
  'IPsec' => sub {
    # An ESP association in transport mode: from 127.0.0.2 to 127.0.0.1, SPI 256, protocol 50.
    my $from = pack 'a16', INADDR_LOOPBACK;
    my $association = "\0" x 56 . $from . pack('NCx3', 256, 50) . pack('a16', inet_aton('127.0.0.2')) .
      pack('Q8', (~0) x 4, (0) x 4) . "\0" x 32 . "\0" x 12 . pack('LLSCCCx7', 0, 0, AF_INET, 0, 0, 0);
    my $cipher = pack('a64LL', 'rfc4106(gcm(aes))', 160, 128) . "\1" x 20;
    netlink(6, [16, 4, $association . attribute(18, $cipher)]);
  },
  'IPVS' => sub {
    my $socket = open_socket(AF_INET, SOCK_RAW, 255);
    my $service = pack 'Sx2a4nx2La16LLL', 6, INADDR_LOOPBACK, 8080, 0, 'rr', 0, 0, ~0 & 0xffffffff;
    setsockopt $socket, 0, 1154, $service or die "IP_VS_SO_SET_ADD: $!\n";
    contents('/proc/net/ip_vs') =~ /^TCP +7F000001:1F90 rr/m or die "the service is not in /proc/net/ip_vs\n";
  },
  'nftables' => sub {
    my $head = pack 'CCn', 1, 0, 0;
    my $end = pack 'CCn', 0, 0, 10;
    netlink(12, [16, 0, $end], [10 << 8, 0x404, $head . attribute(1, "probe\0")], [17, 0, $end]);
  },
  'iptables' => sub {
    my $socket = open_socket(AF_INET, SOCK_RAW, 255);
    my ($table, $size) = (pack('a84', 'filter'), pack('i', 84));
    syscall(55, fileno $socket, 0, 64, $table, $size) == 0 or die "IPT_SO_GET_INFO: $!\n";
  },
  'links: bridge, veth, dummy, ifb' => sub { new_link($_) for qw(bridge veth dummy ifb) },
  'links: VLAN, macvlan, ipvlan' => sub {
    new_child('vlan', attribute(1, pack 'S', 5));
    new_child('macvlan');
    # A link cannot be the parent of both kinds.
    undef $parent;
    new_child('ipvlan');
  },
  'links: VXLAN, Geneve, GRE, IPIP' => sub {
    new_link('vxlan', attribute(1, pack 'L', 5) . attribute(15, pack 'n', 4789));
    new_link('geneve', attribute(1, pack 'L', 5) . attribute(2, INADDR_LOOPBACK));
    new_link('gre', attribute(6, INADDR_LOOPBACK) . attribute(7, inet_aton('127.0.0.2')));
    new_link('ipip', attribute(2, INADDR_LOOPBACK) . attribute(3, inet_aton('127.0.0.2')));
  },
  'links: TUN, TAP' => sub {
    for my $mode (1, 2) {
      my $tun = device("tun$mode", 10, 200);
      my $request = pack 'a16Sx22', "tun$mode", $mode;
      ioctl $tun, 0x400454ca, $request or die "TUNSETIFF: $!\n";
    }
  },
  'VRF' => sub { new_link('vrf', attribute(1, pack 'L', 10)) },
  'bonding' => sub {
    ! -e '/sys/class/net/bond0' or die "bond0 exists without a request\n";
    my $name = new_link('bond');
    contents("/proc/net/bonding/$name") =~ /Bonding Mode/ or die "there is no $name in /proc/net/bonding\n";
  },
  'WireGuard' => sub { new_link('wireguard') },
  'PPP' => sub {
    my $ppp = device('ppp', 108, 0);
    my $unit = pack 'i', -1;
    ioctl $ppp, 0xc004743e, $unit or die "PPPIOCNEWUNIT: $!\n";
    -d '/sys/class/net/ppp' . unpack 'i', $unit or die "there is no link for the unit\n";
    open_socket(24, SOCK_STREAM, 0);
  },

  'ext4, EROFS, overlayfs' => sub { knows_file_system($_) for qw(ext4 erofs overlay) },
  'squashfs' => sub {
    # The kernel reads the super block of this disk and finds none.
    write_file('/probe/disk', "\0" x 65536);
    my $number = ioctl(device('control', 10, 237), 0x4c82, 0) // die "LOOP_CTL_GET_FREE: $!\n";
    my $loop = device('loop', 7, $number, 0060000);
    open my $disk, '<', '/probe/disk' or die "/probe/disk: $!\n";
    ioctl $loop, 0x4c00, fileno $disk or die "LOOP_SET_FD: $!\n";
    # EINVAL: the type is known.
    call_fails(EINVAL, 'mount', '/dev/probe-loop', '/probe', 'squashfs', 1, 0);
    ioctl $loop, 0x4c01, 0 or die "LOOP_CLR_FD: $!\n";
    knows_file_system('squashfs');
  },
  'FUSE' => sub {
    my $fuse = device('fuse', 10, 229);
    mkdir '/probe/mount' or die "mkdir: $!\n";
    call('mount', 'probe', '/probe/mount', 'fuse', 0,
      'fd=' . fileno($fuse) . ',rootmode=40000,user_id=0,group_id=0');
    sysread $fuse, my $request, 65536 or die "read: $!\n";
    # FUSE_INIT.
    expect(26, (unpack 'LL', $request)[1]);
    call('umount2', '/probe/mount', 2);
  },

  'AF_VSOCK' => sub {
    for my $type (SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET) {
      !socket my $socket, 40, $type, 0 or die "a socket of type $type exists\n";
      $! == EAFNOSUPPORT or die "socket of type $type: $!\n";
    }
    # The kernel knows the family.
    contents('/proc/misc') =~ / vsock$/m or die "there is no AF_VSOCK at all\n";
  },
  'programs that the kernel starts' => sub {
    # The dynamic linker and the program are found from the initial mount namespace, where a helper would run.
    write_file('/proc/sys/kernel/core_pipe_limit', '1');
    my $root = '/proc/%P/root';
    my $linker = "$root/ld --library-path $root/lib/x86_64-linux-gnu";
    system('cp -L /lib64/ld-linux-x86-64.so.2 /ld') == 0 or die "cannot copy the dynamic linker\n";
    write_file('/proc/sys/kernel/core_pattern', "|$linker $root/bin/mkdir $root/started");
    # RLIMIT_CORE.
    call('setrlimit', 4, pack 'QQ', 1 << 30, 1 << 30);
    my $child = fork // die "fork: $!\n";
    if (!$child) {
      kill ABRT => $$;
      exit 1;
    }
    # With core_pipe_limit, the process ends after the helper.
    waitpid $child, 0;
    expect(6, $? & 127);
    ! -e '/started' or die "a helper ran in the initial namespaces\n";
  },

  'kernel TLS' => sub {
    my ($client) = connected(6);
    !setsockopt $client, 6, 31, 'tls' or die "TCP_ULP succeeds\n";
    $! == ENOENT or die "TCP_ULP: $!\n";
  },
  'CIFS client' => sub { call_fails(ENODEV, 'mount', '//server/probe', '/probe', 'cifs', 0, 'ro') },
  'NFS client' => sub { call_fails(ENODEV, 'mount', 'server:/probe', '/probe', 'nfs', 0, 'ro') },
  'loadable modules' => sub { call_fails(ENOSYS, 'init_module', '', 0, '') },
);

my $section = '';
my ($rows, $wrong) = (0, 0);
my $config = `zcat /proc/config.gz`;
my %done;

sub report {
  print "@_\n";
  $wrong++;
}

while (<DATA>) {
  $section = $1 if /^## (.*)/;
  last if $section eq 'End';
  next unless /^\| / && !/^\| feature \|/;
  my ($name, $options) = map { s/`//gr } (split / *\| */)[1, 2];
  $rows++;
  my $must_be_set = $section ne 'What it does not have';
  for my $option (split /, */, $options) {
    my $is_set = $config =~ /^CONFIG_\Q$option\E=/m;
    report("$name: $option is " . ($is_set ? 'set' : 'not set')) if $must_be_set ? !$is_set : $is_set;
  }
  my $check = $check{$name};
  if (!$check) {
    report("$name: there is no check of this name in guest-kernel.pl") if $must_be_set;
    next;
  }
  $done{$name} = 1;
  alarm 20;
  eval { $check->(); 1 } or report("$name: " . $@ =~ s/\n$//r);
  alarm 0;
}
report("$_: there is no such row in GUEST_KERNEL.md") for grep { !$done{$_} } sort keys %check;
print "$rows rows, $wrong wrong\n";
exit($wrong ? 1 : 0);
__END__
