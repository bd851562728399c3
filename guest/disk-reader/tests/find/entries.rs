//! Entries of the Boot Loader Specification.

use crate::harness::Content::{Any, Fixture, Text};
use crate::harness::{Content, assert_found, tree};

const FEDORA_BOOT: &str = "8f7e6d5c-4b3a-4291-8807-f6e5d4c3b2a1";
const ROCKY_BOOT: &str = "ab12cd34-5678-4e90-9abc-def012345678";

#[test]
fn entries_of_the_boot_loader_specification_are_found() {
    let fedora = |grubenv: Content<'static>| {
        [
            ("/grub2/grub.cfg", Fixture("fedora/grub.cfg")),
            ("/grub2/grubenv", grubenv),
            (
                "/loader/entries/m-6.14.0-63.fc42.x86_64.conf",
                Fixture("fedora/6.14.0-63.fc42.x86_64.conf"),
            ),
            (
                "/loader/entries/m-6.16.9-200.fc42.x86_64.conf",
                Fixture("fedora/6.16.9-200.fc42.x86_64.conf"),
            ),
            ("/loader/entries/m-0-rescue.conf", Fixture("fedora/rescue.conf")),
            ("/vmlinuz-6.14.0-63.fc42.x86_64", Any),
            ("/initramfs-6.14.0-63.fc42.x86_64.img", Any),
            ("/vmlinuz-6.16.9-200.fc42.x86_64", Any),
            ("/initramfs-6.16.9-200.fc42.x86_64.img", Any),
        ]
    };
    let command_line = "root=UUID=19283746-5564-4738-9201-abcdefabcdef rootflags=subvol=root ro no_timer_check \
                        console=tty1 console=ttyS0,115200n8";
    let esp = tree(
        "vda2",
        "vfat",
        "AAAA-BBBB",
        &[("/EFI/fedora/grub.cfg", Fixture("fedora/esp.cfg"))],
    );
    let environment = "# GRUB Environment Block\nsaved_entry=m-6.14.0-63.fc42.x86_64\n";
    for (name, grubenv, version) in [
        (
            "Fedora with an unknown saved entry",
            Fixture("fedora/grubenv"),
            "6.16.9-200",
        ),
        ("Fedora with an older saved entry", Text(environment), "6.14.0-63"),
    ] {
        assert_found(
            name,
            &[esp, tree("vda3", "ext4", FEDORA_BOOT, &fedora(grubenv))],
            [
                &format!("vda3:/vmlinuz-{version}.fc42.x86_64 vda3:/initramfs-{version}.fc42.x86_64.img"),
                command_line,
                &format!("the boot loader entry /loader/entries/m-{version}.fc42.x86_64.conf on vda3"),
            ],
        );
    }
    assert_found(
        "Rocky 9, with kernel options in the environment and options of tuned",
        &[tree(
            "vda2",
            "xfs",
            ROCKY_BOOT,
            &[
                ("/grub2/grub.cfg", Fixture("rocky-9/grub.cfg")),
                ("/grub2/grubenv", Fixture("rocky-9/grubenv")),
                (
                    "/loader/entries/m-5.14.0-570.17.1.el9_6.x86_64.conf",
                    Fixture("rocky-9/entry.conf"),
                ),
                ("/vmlinuz-5.14.0-570.17.1.el9_6.x86_64", Any),
                ("/initramfs-5.14.0-570.17.1.el9_6.x86_64.img", Any),
            ],
        )],
        [
            "vda2:/vmlinuz-5.14.0-570.17.1.el9_6.x86_64 vda2:/initramfs-5.14.0-570.17.1.el9_6.x86_64.img",
            "root=UUID=c0ffee00-1234-4abc-8def-00112233aabb ro console=ttyS0,115200n8 no_timer_check \
             crashkernel=1G-4G:192M,4G-64G:256M,64G-:512M skew_tick=1 isolcpus=3",
            "the boot loader entry /loader/entries/m-5.14.0-570.17.1.el9_6.x86_64.conf on vda2",
        ],
    );
    assert_found(
        "Rocky 9 without an environment",
        &[tree(
            "vda2",
            "xfs",
            ROCKY_BOOT,
            &[
                ("/grub2/grub.cfg", Fixture("rocky-9/grub.cfg")),
                ("/loader/entries/a.conf", Text("linux /a\noptions $kernelopts")),
                ("/a", Any),
            ],
        )],
        [
            "vda2:/a",
            "root=UUID=c0ffee00-1234-4abc-8def-00112233aabb ro fallback",
            "the boot loader entry /loader/entries/a.conf on vda2",
        ],
    );
    assert_found(
        "systemd-boot: the pattern in loader.conf, and a dollar sign that stands for itself",
        &[tree(
            "vda1",
            "vfat",
            "AAAA-BBBB",
            &[
                ("/loader/loader.conf", Text("timeout 3\ndefault *-lts.conf\n")),
                (
                    "/loader/entries/arch.conf",
                    Text("title Arch\nlinux /vmlinuz-linux\noptions ro"),
                ),
                (
                    "/loader/entries/arch-lts.conf",
                    Text(
                        "title Arch (LTS)\nlinux /vmlinuz-lts\ninitrd /ucode.img\ninitrd /lts.img\noptions a=$b\noptions ro",
                    ),
                ),
                ("/vmlinuz-linux", Any),
                ("/vmlinuz-lts", Any),
                ("/ucode.img", Any),
                ("/lts.img", Any),
            ],
        )],
        [
            "vda1:/vmlinuz-lts vda1:/ucode.img vda1:/lts.img",
            "a=$b ro",
            "the boot loader entry /loader/entries/arch-lts.conf on vda1",
        ],
    );
    assert_found(
        "entries below /boot, with paths relative to it, and a broken newest entry",
        &[tree(
            "vda1",
            "ext4",
            "u",
            &[
                ("/boot/loader/entries/2.conf", Text("linux /gone")),
                ("/boot/loader/entries/1.conf", Text("linux /1/linux\ninitrd /1/initrd")),
                ("/boot/1/linux", Any),
                ("/boot/1/initrd", Any),
            ],
        )],
        [
            "vda1:/boot/1/linux vda1:/boot/1/initrd",
            "",
            "the boot loader entry /boot/loader/entries/1.conf on vda1",
        ],
    );
}
