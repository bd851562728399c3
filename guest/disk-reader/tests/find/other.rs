//! Configurations of SYSLINUX, and disks without a configuration.

use nutshell_disk_reader::find_kernel;

use crate::harness::Content::{Any, Fixture, Text};
use crate::harness::{assert_found, build, describe, tree};

#[test]
fn labels_of_extlinux_are_found() {
    assert_found(
        "Alpine",
        &[tree(
            "vda1",
            "ext4",
            "0a1b2c3d-4e5f-4607-8899-aabbccddeeff",
            &[
                ("/boot/extlinux.conf", Fixture("alpine/extlinux.conf")),
                ("/boot/vmlinuz-virt", Any),
                ("/boot/initramfs-virt", Any),
                ("/boot/vmlinuz-lts", Any),
                ("/boot/initramfs-lts", Any),
            ],
        )],
        [
            "vda1:/boot/vmlinuz-virt vda1:/boot/initramfs-virt",
            "root=UUID=0a1b2c3d-4e5f-4607-8899-aabbccddeeff modules=ext4 console=ttyS0,115200 rootfstype=ext4",
            "the configuration of SYSLINUX /boot/extlinux.conf on vda1",
        ],
    );
    for (configuration, files, command_line) in [
        (
            "default two\nlabel one\nkernel /b\nlabel two\nkernel /a\nappend ro",
            "/a",
            "ro",
        ),
        (
            "label one\n linux ../../a\n initrd /i,/j\n append ro",
            "/boot/extlinux/../../a /i /j",
            "ro",
        ),
        ("append ro\nlabel one\nkernel /a", "/a", "ro"),
        ("append ro\nlabel one\nkernel /a\nappend -", "/a", ""),
        ("label one\nkernel /a\nappend initrd=/i,/j ro", "/a /i /j", "ro"),
        ("label one\nkernel menu.c32\nlabel two\nkernel ::/a", "/a", ""),
        ("include /more.cfg\n", "/a", "more"),
        ("menu include /more.cfg title\n", "/a", "more"),
    ] {
        let test = build(&[tree(
            "vda1",
            "ext4",
            "",
            &[
                ("/boot/extlinux/extlinux.conf", Text(configuration)),
                (
                    "/more.cfg",
                    Text("include /more.cfg\nlabel more\nkernel /a\nappend more"),
                ),
                ("/a", Any),
                ("/b", Any),
                ("/i", Any),
                ("/j", Any),
            ],
        )]);
        let entry = find_kernel(&test.disk).unwrap_or_else(|error| panic!("{configuration}: {error}"));
        let [found, found_command_line, _] = describe(&test.disk, &entry);
        assert_eq!(
            (found.replace("vda1:", "").as_str(), found_command_line.as_str()),
            (files, command_line),
            "{configuration}"
        );
    }
}

#[test]
fn newest_kernel_is_found() {
    assert_found(
        "kernels of Debian in /boot",
        &[tree(
            "vda1",
            "ext4",
            "1-2",
            &[
                ("/boot/vmlinuz-6.1.0-9-amd64", Any),
                ("/boot/vmlinuz-6.1.0-10-amd64", Any),
                ("/boot/initrd.img-6.1.0-10-amd64", Any),
                ("/usr/lib/os-release", Any),
            ],
        )],
        [
            "vda1:/boot/vmlinuz-6.1.0-10-amd64 vda1:/boot/initrd.img-6.1.0-10-amd64",
            "root=UUID=1-2 ro",
            "the newest kernel /boot/vmlinuz-6.1.0-10-amd64 on vda1",
        ],
    );
    assert_found(
        "kernels of Fedora on a partition for /boot, and a root in fstab",
        &[
            tree(
                "vda1",
                "ext4",
                "1-2",
                &[
                    ("/vmlinuz-6.1.fc42", Any),
                    ("/initramfs-6.1.fc42.img", Any),
                    ("/vmlinuz-9-rescue-1", Any),
                ],
            ),
            tree(
                "vda2",
                "btrfs",
                "3-4",
                &[
                    ("/etc/os-release", Any),
                    ("/etc/fstab", Text("UUID=5-6 / btrfs subvol=root 0 0")),
                ],
            ),
        ],
        [
            "vda1:/vmlinuz-6.1.fc42 vda1:/initramfs-6.1.fc42.img",
            "root=UUID=5-6 rootflags=subvol=root ro",
            "the newest kernel /vmlinuz-6.1.fc42 on vda1",
        ],
    );
}
