//! Tests of the search for a kernel on disks of virtual machines. The machines boot the kernel of the disk reader. The
//! tests need sfdisk(8), mcopy(1) and the mkfs programs of the file systems.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as ProcessStdio};

use nutshell_protocol::{DiskKernel, Failure, Request, Response};

use crate::harness::{shell, unique};
use crate::{Machine, create_image};

const MIB: u64 = 1 << 20;

/// The content of a partition or of a whole disk.
enum Content<'c> {
    /// A file system of this kind with this UUID and these files.
    Files(Kind, &'c str, &'c [(&'c str, &'c [u8])]),
    /// Bytes at an offset.
    Bytes(u64, &'c [u8]),
}

#[derive(Clone, Copy)]
enum Kind {
    Btrfs,
    Ext4,
    /// [`format`] ignores the UUID and the size: the time of the creation serves as the UUID, and genisoimage determines
    /// the size.
    Iso9660,
    Vfat,
    Xfs,
}

/// Creates a file system in a file.
fn format(kind: Kind, uuid: &str, files: &[(&str, &[u8])], size: u64) -> PathBuf {
    let root = std::env::temp_dir().join(format!("disk-{}", unique()));
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let image = root.with_extension("image");
    File::create(&image).unwrap().set_len(size).unwrap();
    let [folder, file] = [root.to_str().unwrap(), image.to_str().unwrap()];
    match kind {
        Kind::Btrfs => run(&[
            "mkfs.btrfs",
            "-q",
            "-m",
            "single",
            "-U",
            uuid,
            "--rootdir",
            folder,
            file,
        ]),
        Kind::Ext4 => run(&["mke2fs", "-q", "-t", "ext4", "-U", uuid, "-d", folder, file]),
        Kind::Iso9660 => run(&["genisoimage", "-quiet", "-rock", "-joliet", "-output", file, folder]),
        Kind::Vfat => {
            run(&["mkfs.vfat", "-i", &uuid.replace('-', ""), file]);
            for entry in fs::read_dir(&root).unwrap() {
                run(&[
                    "mcopy",
                    "-s",
                    "-i",
                    file,
                    entry.unwrap().path().to_str().unwrap(),
                    "::/",
                ]);
            }
        }
        Kind::Xfs => {
            let prototype = root.with_extension("prototype");
            fs::write(&prototype, format!("/dev/null\n0 0\n{}", xfs_prototype(&root))).unwrap();
            let prototype = prototype.to_str().unwrap();
            // Without --unsupported, it makes no file systems below 300 MiB.
            run(&[
                "mkfs.xfs",
                "-q",
                "--unsupported",
                "-m",
                &format!("uuid={uuid}"),
                "-p",
                prototype,
                file,
            ]);
        }
    }
    image
}

/// Describes a directory for mkfs.xfs(8).
fn xfs_prototype(directory: &Path) -> String {
    let mut text = "d--755 0 0\n".to_owned();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        text += &match path.is_dir() {
            true => format!("{name} {}", xfs_prototype(&path)),
            false => format!("{name} ---644 0 0 {}\n", path.display()),
        };
    }
    text + "$\n"
}

fn run(command: &[&str]) {
    let output = Command::new(command[0]).args(&command[1..]).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Creates a disk with a partition table of the kind `label` and partitions of 16 MiB, each with its type.
fn partition(label: &str, partitions: &[(&str, Content<'_>)]) -> PathBuf {
    let disk = std::env::temp_dir().join(format!("disk-{}", unique()));
    let size = (partitions.len() as u64 * 16 + 2) * MIB;
    let file = File::create(&disk).unwrap();
    file.set_len(size).unwrap();
    let mut script = format!("label: {label}\n");
    for (number, (kind, _)) in (0..).zip(partitions) {
        let start = (1 + 16 * number) * MIB / 512;
        script.push_str(&format!("start={start}, size={}, type={kind}\n", 16 * MIB / 512));
    }
    let mut command = Command::new("sfdisk");
    command.arg("--quiet").arg(&disk).stdin(ProcessStdio::piped());
    let mut child = command.spawn().expect("sfdisk runs");
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{script}");
    for (number, (_, content)) in (0..).zip(partitions) {
        let start = (1 + 16 * number) * MIB;
        match content {
            Content::Files(kind, uuid, files) => {
                let bytes = fs::read(format(*kind, uuid, files, 16 * MIB)).unwrap();
                file.write_all_at(&bytes, start).unwrap();
            }
            Content::Bytes(offset, bytes) => file.write_all_at(bytes, start + offset).unwrap(),
        }
    }
    disk
}

/// Asks the agent for the kernel on the disk in `slot`. Returns the response, the kernel and the initrd.
fn find(machine: &mut Machine, slot: u32) -> Result<(DiskKernel, Vec<u8>, Vec<u8>), Failure> {
    let (kernel, initrd) = (machine.agent.listen(), machine.agent.listen());
    let id = machine.agent.send(Request::FindDiskKernel {
        slot,
        kernel_stream_port: kernel.port,
        initrd_stream_port: initrd.port,
    });
    let [kernel, initrd] = [kernel, initrd].map(|port| {
        let mut stream = port.accept();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        })
    });
    let response = machine.agent.reply(id);
    let (kernel, initrd) = (kernel.join().unwrap(), initrd.join().unwrap());
    match response? {
        Response::DiskKernel(found) => Ok((found, kernel, initrd)),
        other => panic!("{other:?} instead of a kernel"),
    }
}

#[test]
fn kernels_of_disks_are_sent_to_the_host() {
    let kernel: Vec<u8> = (0..=250).cycle().take(3 << 20).collect();
    let grub = "search --fs-uuid --set=root 11111111-2222-3333-4444-555555555555\n\
        menuentry x {\n linux /vmlinuz-1 root=UUID=66666666-2222-3333-4444-555555555555 ro\n initrd /early /initrd-1\n}";
    let gpt = partition(
        "gpt",
        &[
            (
                "linux",
                Content::Files(
                    Kind::Ext4,
                    "66666666-2222-3333-4444-555555555555",
                    &[("etc/os-release", b"ID=x")],
                ),
            ),
            // A BIOS boot partition, in which GRUB's core image is. It has no file system.
            (
                "21686148-6449-6E6F-744E-656564454649",
                Content::Bytes(0, b"\xfa\x31\xc0"),
            ),
            // An extended boot loader partition (XBOOTLDR).
            (
                "BC13C2FF-59E6-4262-A352-B275FD6F7172",
                Content::Files(
                    Kind::Ext4,
                    "11111111-2222-3333-4444-555555555555",
                    &[
                        ("grub/grub.cfg", grub.as_bytes()),
                        ("vmlinuz-1", &kernel),
                        ("early", b"early"),
                        ("initrd-1", b"initrd"),
                    ],
                ),
            ),
        ],
    );
    let extlinux = b"label alpine\nlinux vmlinuz-virt\nappend modules=ext4\n";
    let mbr = partition(
        "dos",
        &[(
            "83",
            Content::Files(
                Kind::Ext4,
                "11111111-2222-3333-4444-555555555555",
                &[("boot/extlinux.conf", extlinux), ("boot/vmlinuz-virt", b"kernel")],
            ),
        )],
    );
    let whole = format(
        Kind::Ext4,
        "11111111-2222-3333-4444-555555555555",
        &[
            ("boot/vmlinuz-6", b"kernel"),
            ("boot/initrd.img-6", b"initrd"),
            ("usr/lib/os-release", b""),
        ],
        16 * MIB,
    );
    // A file system whose journal must be replayed, as after a crash. The machine gets this disk read-only (slot 3 below),
    // so the agent must mount it without replaying the journal.
    let dirty = std::env::temp_dir().join(format!("disk-{}", unique()));
    fs::copy(&whole, &dirty).unwrap();
    let mut command = Command::new("debugfs");
    command.args(["-w", "-R", "feature needs_recovery"]).arg(&dirty);
    assert!(command.status().unwrap().success());

    let disks: [&Path; 4] = [&gpt, &mbr, &whole, &dirty];
    let mut machine = Machine::boot_disk_reader(&disks, |slot| if slot == 3 { "on" } else { "off" });
    // The agent derives it from the file system if the disk has no configuration of a boot loader.
    let derived_command_line = "root=UUID=11111111-2222-3333-4444-555555555555 ro";
    for (slot, expected_kernel, initrd, command_line, source) in [
        (
            0,
            &kernel[..],
            &b"early\0\0\0initrd\0\0"[..],
            "root=UUID=66666666-2222-3333-4444-555555555555 ro",
            "GRUB's configuration /grub/grub.cfg on vda3",
        ),
        (
            1,
            b"kernel",
            b"",
            "modules=ext4",
            "the configuration of SYSLINUX /boot/extlinux.conf on vdb1",
        ),
        (
            2,
            b"kernel",
            b"initrd\0\0",
            derived_command_line,
            "the newest kernel /boot/vmlinuz-6 on vdc",
        ),
        (
            3,
            b"kernel",
            b"initrd\0\0",
            derived_command_line,
            "the newest kernel /boot/vmlinuz-6 on vdd",
        ),
    ] {
        let expected = (expected_kernel, initrd, command_line, source);
        assert_found(&mut machine, slot, expected);
    }
}

/// Asserts that the agent finds a kernel on the disk in `slot`: its bytes, its initrd, its command line and its source.
fn assert_found(machine: &mut Machine, slot: u32, (kernel, initrd, command_line, source): (&[u8], &[u8], &str, &str)) {
    let (found, sent_kernel, sent_initrd) = find(machine, slot).unwrap();
    let expected = DiskKernel {
        kernel_size: kernel.len() as u64,
        initrd_size: initrd.len() as u64,
        command_line: command_line.to_owned(),
        source: source.to_owned(),
    };
    assert_eq!(found, expected);
    assert!(
        sent_kernel == kernel,
        "the kernel that the agent sent from disk {slot} ({} bytes) is not the expected one",
        sent_kernel.len()
    );
    assert_eq!(sent_initrd, initrd);
}

#[test]
fn kernels_are_found_on_all_file_systems_of_distributions() {
    const ROOT: &str = "11111111-2222-3333-4444-555555555555";
    let entry =
        format!("linux /Debian/6.12.1-amd64/linux\ninitrd /Debian/6.12.1-amd64/initrd\noptions root=UUID={ROOT} ro\n");
    let boot: &[(&str, &[u8])] = &[
        ("loader/entries/Debian-6.12.1-amd64.conf", entry.as_bytes()),
        ("Debian/6.12.1-amd64/linux", b"kernel"),
        ("Debian/6.12.1-amd64/initrd", b"initrd"),
    ];
    let esp = partition(
        "gpt",
        &[
            ("uefi", Content::Files(Kind::Vfat, "AAAA-BBBB", boot)),
            (
                "linux",
                Content::Files(Kind::Xfs, ROOT, &[("etc/os-release", b"ID=debian")]),
            ),
        ],
    );
    let root: &[(&str, &[u8])] = &[
        ("boot/vmlinuz-6", b"kernel"),
        ("boot/initrd.img-6", b"initrd"),
        ("usr/lib/os-release", b""),
    ];
    let xfs = format(Kind::Xfs, ROOT, root, 16 * MIB);
    let btrfs = format(Kind::Btrfs, ROOT, root, 64 * MIB);
    let iso = format(Kind::Iso9660, "", boot, 0);
    let disks: [&Path; 4] = [&esp, &xfs, &btrfs, &iso];
    let mut machine = Machine::boot_disk_reader(&disks, |slot| if slot > 1 { "on" } else { "off" });
    for (slot, source) in [
        (
            0,
            "the boot loader entry /loader/entries/Debian-6.12.1-amd64.conf on vda1",
        ),
        (1, "the newest kernel /boot/vmlinuz-6 on vdb"),
        (2, "the newest kernel /boot/vmlinuz-6 on vdc"),
        (
            3,
            "the boot loader entry /loader/entries/Debian-6.12.1-amd64.conf on vdd",
        ),
    ] {
        let command_line = format!("root=UUID={ROOT} ro");
        assert_found(&mut machine, slot, (b"kernel", b"initrd\0\0", &command_line, source));
    }
}

#[test]
fn disk_without_a_kernel_is_an_error_and_is_unmounted_afterwards() {
    let unsupported = partition(
        "gpt",
        &[
            (
                "linux",
                Content::Bytes(512, b"LABELONE\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0LVM2 001"),
            ),
            ("linux", Content::Bytes(0, b"LUKS\xba\xbe")),
        ],
    );
    let blank = std::env::temp_dir().join(format!("disk-{}", unique()));
    File::create(&blank).unwrap().set_len(MIB).unwrap();
    let mut machine = Machine::boot_disk_reader(&[&create_image(), &unsupported, &blank], |_| "off");
    for (slot, parts) in [
        (
            0,
            &["disk slot 0: no kernel found", "vda (ext4)", "none of them exists"][..],
        ),
        (
            1,
            &[
                "no file system that can be mounted",
                "vdb1 (LVM2_member",
                "vdb2 (crypto_LUKS",
            ],
        ),
        (2, &["no file system that can be mounted"]),
        (7, &["find the disk in disk slot 7"]),
    ] {
        let message = find(&mut machine, slot).unwrap_err().message;
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
    }
    // `run` mounts the disk in slot 0 for writing, as the container's root. The kernel would refuse that if the agent's
    // read-only mount were left.
    assert_eq!(machine.run(&shell("touch /new && exit 5")).0, 5);
}
