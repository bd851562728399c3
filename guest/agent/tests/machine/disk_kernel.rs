//! Tests of what is found on disks of virtual machines. They need sfdisk(8).

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as ProcessStdio};

use nutshell_protocol::{DiskKernel, Failure, Request, Response};

use crate::harness::{shell, unique};
use crate::{Machine, create_image};

const MIB: u64 = 1 << 20;

/// A partition, or a whole disk: what is in it.
enum Content<'c> {
    /// An ext4 file system with these files and this UUID.
    Ext4(&'c str, &'c [(&'c str, &'c [u8])]),
    /// Bytes at an offset.
    Bytes(u64, &'c [u8]),
}

/// Creates an ext4 file system in a file.
fn format(uuid: &str, files: &[(&str, &[u8])], size: u64) -> PathBuf {
    let root = std::env::temp_dir().join(format!("disk-{}", unique()));
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let image = root.with_extension("ext4");
    File::create(&image).unwrap().set_len(size).unwrap();
    let mut command = Command::new("mke2fs");
    command
        .args(["-q", "-t", "ext4", "-U", uuid, "-d"])
        .arg(&root)
        .arg(&image);
    assert!(command.status().unwrap().success());
    image
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
            Content::Ext4(uuid, files) => {
                let bytes = fs::read(format(uuid, files, 16 * MIB)).unwrap();
                file.write_all_at(&bytes, start).unwrap();
            }
            Content::Bytes(offset, bytes) => file.write_all_at(bytes, start + offset).unwrap(),
        }
    }
    disk
}

/// Asks the agent for the kernel in `slot`. Returns the response, the kernel and the initrd.
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
                Content::Ext4("66666666-2222-3333-4444-555555555555", &[("etc/os-release", b"ID=x")]),
            ),
            // Like the partition for GRUB on a disk that boots without EFI: there is no file system in it.
            (
                "21686148-6449-6E6F-744E-656564454649",
                Content::Bytes(0, b"\xfa\x31\xc0"),
            ),
            (
                "BC13C2FF-59E6-4262-A352-B275FD6F7172",
                Content::Ext4(
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
            Content::Ext4(
                "11111111-2222-3333-4444-555555555555",
                &[("boot/extlinux.conf", extlinux), ("boot/vmlinuz-virt", b"kernel")],
            ),
        )],
    );
    let whole = format(
        "11111111-2222-3333-4444-555555555555",
        &[
            ("boot/vmlinuz-6", b"kernel"),
            ("boot/initrd.img-6", b"initrd"),
            ("usr/lib/os-release", b""),
        ],
        16 * MIB,
    );
    // As after a crash, and on a device that cannot be written: the journal cannot be replayed.
    let dirty = std::env::temp_dir().join(format!("disk-{}", unique()));
    fs::copy(&whole, &dirty).unwrap();
    let mut command = Command::new("debugfs");
    command.args(["-w", "-R", "feature needs_recovery"]).arg(&dirty);
    assert!(command.status().unwrap().success());

    let disks: [&Path; 4] = [&gpt, &mbr, &whole, &dirty];
    let mut machine = Machine::boot_with_access(&disks, &[], |slot| if slot == 3 { "on" } else { "off" });
    let newest = "root=UUID=11111111-2222-3333-4444-555555555555 ro";
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
            newest,
            "the newest kernel /boot/vmlinuz-6 on vdc",
        ),
        (
            3,
            b"kernel",
            b"initrd\0\0",
            newest,
            "the newest kernel /boot/vmlinuz-6 on vdd",
        ),
    ] {
        let (found, sent_kernel, sent_initrd) = find(&mut machine, slot).unwrap();
        let expected = DiskKernel {
            kernel_size: expected_kernel.len() as u64,
            initrd_size: initrd.len() as u64,
            command_line: command_line.to_owned(),
            source: source.to_owned(),
        };
        assert_eq!(found, expected);
        assert!(
            sent_kernel == expected_kernel,
            "{} bytes of disk {slot}",
            sent_kernel.len()
        );
        assert_eq!(sent_initrd, initrd);
    }
}

#[test]
fn disk_without_a_kernel_is_an_error_and_unused_afterwards() {
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
    let mut machine = Machine::boot(&[&create_image(), &unsupported, &blank]);
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
    // It can be mounted for writing, which the kernel refuses as long as it is mounted read-only.
    assert_eq!(machine.run(&shell("touch /new && exit 5")).0, 5);
}
