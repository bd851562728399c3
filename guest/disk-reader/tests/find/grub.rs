//! Menus of GRUB.

use nutshell_disk_reader::find_kernel;

use crate::harness::Content::{Any, Fixture, Link, Text};
use crate::harness::{Tree, assert_found, build, describe, tree};

const DEBIAN_12: &str = "0f6b2f0e-7a54-4b9c-9a35-1f2d3c4b5a69";
const DEBIAN_13_BOOT: &str = "3c0f8a52-4a2e-4d0e-8f16-5b7d1a9c2e10";
const UBUNTU_22: &str = "2d1e0f3a-aaaa-4bbb-8ccc-0123456789ab";
const UBUNTU_24_BOOT: &str = "5a4b3c2d-1234-4567-89ab-cdef01234567";
const OPENSUSE: &str = "d4c3b2a1-0f0e-4d0c-8b0a-090807060504";

#[test]
fn default_entries_of_grub_configurations_are_found() {
    assert_found(
        "Debian 12",
        &[
            tree(
                "vda15",
                "vfat",
                "1234-5678",
                &[("/EFI/debian/grub.cfg", Fixture("debian-12/esp.cfg"))],
            ),
            tree(
                "vda1",
                "ext4",
                DEBIAN_12,
                &[
                    ("/boot/grub/grub.cfg", Fixture("debian-12/grub.cfg")),
                    ("/boot/vmlinuz-6.1.0-21-cloud-amd64", Any),
                    ("/boot/initrd.img-6.1.0-21-cloud-amd64", Any),
                    ("/boot/vmlinuz-6.1.0-18-cloud-amd64", Any),
                    ("/boot/initrd.img-6.1.0-18-cloud-amd64", Any),
                ],
            ),
        ],
        [
            "vda1:/boot/vmlinuz-6.1.0-21-cloud-amd64 vda1:/boot/initrd.img-6.1.0-21-cloud-amd64",
            "root=UUID=0f6b2f0e-7a54-4b9c-9a35-1f2d3c4b5a69 ro console=tty0 console=ttyS0,115200 \
             earlyprintk=ttyS0,115200 consoleblank=0",
            "GRUB's configuration /boot/grub/grub.cfg on vda1",
        ],
    );
    assert_found(
        "Debian 13 with /boot on a partition and an older kernel as saved default",
        &[
            tree(
                "vda1",
                "ext4",
                "b7a1d2c3-1111-4222-8333-944455556666",
                &[("/etc/os-release", Any)],
            ),
            tree(
                "vda2",
                "ext4",
                DEBIAN_13_BOOT,
                &[
                    ("/grub/grub.cfg", Fixture("debian-13/grub.cfg")),
                    ("/grub/grubenv", Fixture("debian-13/grubenv")),
                    ("/vmlinuz-6.12.43+deb13-amd64", Any),
                    ("/initrd.img-6.12.43+deb13-amd64", Any),
                    ("/vmlinuz-6.12.48+deb13-amd64", Any),
                    ("/initrd.img-6.12.48+deb13-amd64", Any),
                ],
            ),
        ],
        [
            "vda2:/vmlinuz-6.12.43+deb13-amd64 vda2:/initrd.img-6.12.43+deb13-amd64",
            "root=UUID=b7a1d2c3-1111-4222-8333-944455556666 ro quiet",
            "GRUB's configuration /grub/grub.cfg on vda2",
        ],
    );
    assert_found(
        "Ubuntu 22.04, whose default has no initrd at the first try",
        &[tree(
            "vda1",
            "ext4",
            UBUNTU_22,
            &[
                ("/boot/grub/grub.cfg", Fixture("ubuntu-22.04/grub.cfg")),
                ("/boot/grub/grubenv", Fixture("ubuntu-22.04/grubenv")),
                ("/boot/vmlinuz-5.15.0-1034-kvm", Any),
                ("/boot/initrd.img-5.15.0-1034-kvm", Any),
            ],
        )],
        [
            "vda1:/boot/vmlinuz-5.15.0-1034-kvm vda1:/boot/initrd.img-5.15.0-1034-kvm",
            "root=PARTUUID=6d5c4b3a-01 ro console=tty1 console=ttyS0",
            "GRUB's configuration /boot/grub/grub.cfg on vda1",
        ],
    );
    assert_found(
        "Ubuntu 24.04",
        &[
            tree(
                "vda1",
                "ext4",
                "7e6d5c4b-9876-4543-a210-fedcba987654",
                &[("/etc/os-release", Any)],
            ),
            tree(
                "vda15",
                "vfat",
                "ABCD-0001",
                &[("/EFI/ubuntu/grub.cfg", Fixture("ubuntu-24.04/esp.cfg"))],
            ),
            tree(
                "vda16",
                "ext4",
                UBUNTU_24_BOOT,
                &[
                    ("/grub/grub.cfg", Fixture("ubuntu-24.04/grub.cfg")),
                    ("/vmlinuz-6.8.0-45-generic", Any),
                    ("/initrd.img-6.8.0-45-generic", Any),
                ],
            ),
        ],
        [
            "vda16:/vmlinuz-6.8.0-45-generic vda16:/initrd.img-6.8.0-45-generic",
            "root=UUID=7e6d5c4b-9876-4543-a210-fedcba987654 ro console=tty1 console=ttyS0",
            "GRUB's configuration /grub/grub.cfg on vda16",
        ],
    );
    assert_found(
        "openSUSE",
        &[tree(
            "vda3",
            "btrfs",
            OPENSUSE,
            &[
                ("/boot/grub2/grub.cfg", Fixture("opensuse/grub.cfg")),
                ("/boot/grub2/grubenv", Fixture("opensuse/grubenv")),
                (
                    "/boot/vmlinuz-6.17.2-1-default",
                    Link("../usr/lib/modules/6.17.2-1-default/vmlinuz"),
                ),
                ("/usr/lib/modules/6.17.2-1-default/vmlinuz", Any),
                ("/boot/initrd-6.17.2-1-default", Any),
            ],
        )],
        [
            "vda3:/boot/vmlinuz-6.17.2-1-default vda3:/boot/initrd-6.17.2-1-default",
            "root=UUID=d4c3b2a1-0f0e-4d0c-8b0a-090807060504 splash=silent security=selinux selinux=1 mitigations=auto",
            "GRUB's configuration /boot/grub2/grub.cfg on vda3",
        ],
    );
}

#[test]
fn menus_of_grub_are_evaluated() {
    // The default entry of each script boots kernel /a with the initrds and the command line.
    for (script, files, command_line) in [
        ("menuentry x { linux /a ro quiet; initrd /i }", "/a /i", "ro quiet"),
        (
            "set default=1\nmenuentry x { linux /b }\nmenuentry y { linux /a 1 }",
            "/a",
            "1",
        ),
        (
            "default=y\nmenuentry x { linux /b }\nmenuentry y { linux /a 1 }",
            "/a",
            "1",
        ),
        (
            "set default=idy\nmenuentry x { linux /b }\nmenuentry y --id idy { linux /a 1 }",
            "/a",
            "1",
        ),
        (
            "set default='1>1'\nmenuentry x { linux /b }\nsubmenu s { menuentry y { linux /b }\nmenuentry z { linux /a } }",
            "/a",
            "",
        ),
        (
            "set default='s>z'\nmenuentry x { linux /b }\nsubmenu s { menuentry y { linux /b }\nmenuentry z { linux /a } }",
            "/a",
            "",
        ),
        ("submenu s { menuentry z { linux /a } }", "/a", ""),
        // An absent default means the first entry, as does one that is out of range.
        (
            "set default=9\nmenuentry x { linux /a }\nmenuentry y { linux /b }",
            "/a",
            "",
        ),
        (
            "set default=gone\nmenuentry x { linux /a }\nmenuentry y { linux /b }",
            "/a",
            "",
        ),
        // Entries that boot no kernel of the disk are passed over.
        (
            "menuentry x { chainloader +1 }\nmenuentry y { linux /gone }\nmenuentry z { linux /a }",
            "/a",
            "",
        ),
        (
            "linux_args=\"a  b\"\nmenuentry x { linux /a $linux_args \"$linux_args\" '$no' \\$x }",
            "/a",
            "a b \"a  b\" $no $x",
        ),
        ("menuentry x { linux16 ($root)/a\ninitrd16 /i /j }", "/a /i /j", ""),
        (
            "menuentry x { linuxefi (hd0,gpt1)/a\ninitrdefi (hd0,1)/i }",
            "/a /i",
            "",
        ),
        ("search --label --set=d DATA\nmenuentry x { linux ($d)/a }", "/a", ""),
        (
            "search --label DATA --set d --no-floppy\nmenuentry x { linux ($d)/a }",
            "/a",
            "",
        ),
        (
            "search --file --set /a\nset root=$root\nmenuentry x { linux /a }",
            "/a",
            "",
        ),
        ("search.fs_label DATA d\nmenuentry x { linux ($d)/a }", "/a", ""),
        (
            "if [ -f /a ]; then k=/a; else k=/b; fi; menuentry x { linux $k }",
            "/a",
            "",
        ),
        (
            "if [ -f /gone ]; then k=/b; elif test -d /boot; then k=/a; fi; menuentry x { linux $k }",
            "/a",
            "",
        ),
        (
            "for k in /b /a; do\n kernel=$k\ndone\nmenuentry x { linux $kernel }",
            "/a",
            "",
        ),
        (
            "function f {\n linux $1 $2 $#\n}\nmenuentry x { f /a two }",
            "/a",
            "two 2",
        ),
        (
            "function f { return 1; linux /b; }\nif f; then k=/b; else k=/a; fi\nmenuentry x { linux $k }",
            "/a",
            "",
        ),
        (
            "menuentry 'a title' --class c --hotkey=1 --users '' { linux /a \"$1\" ${chosen} }",
            "/a",
            "\"a title\" a title",
        ),
        ("source /more.cfg\n", "/a", "more"),
        ("configfile /more.cfg\nmenuentry x { linux /b }", "/a", "more"),
        ("configfile /gone.cfg\nmenuentry x { linux /a }", "/a", ""),
        (
            "i=0; increment i; increment i; decrement i; menuentry x { linux /a $i }",
            "/a",
            "1",
        ),
        (
            "load_env\nset default=$saved_entry\nmenuentry x { linux /b }\nmenuentry y { linux /a $other }",
            "/a",
            "o",
        ),
        ("load_env saved_entry\nmenuentry x { linux /a $other }", "/a", ""),
        (
            "load_env\nif [ \"${next_entry}\" ]; then set default=\"${next_entry}\"; fi\nmenuentry x { linux /b }\nmenuentry y { linux /b }\nmenuentry z { linux /a }",
            "/a",
            "",
        ),
        (
            "# comment {\nmenuentry x { # comment }\n linux /a \\\n ro\n}",
            "/a",
            "ro",
        ),
        ("while true; do linux /b; done\nmenuentry x { linux /a }", "/a", ""),
        (
            "menuentry x { linux /a }\nexit\nset default=1\nmenuentry y { linux /b }",
            "/a",
            "",
        ),
    ] {
        let test = build(&[Tree {
            name: "vda1",
            kind: "ext4",
            uuid: "u",
            label: "DATA",
            files: &[
                ("/boot/grub/grub.cfg", Text(script)),
                (
                    "/boot/grub/grubenv",
                    Text("# GRUB Environment Block\nsaved_entry=y\nnext_entry=z\nother=o\n####"),
                ),
                ("/more.cfg", Text("menuentry more { linux /a more }")),
                ("/a", Any),
                ("/b", Any),
                ("/i", Any),
                ("/j", Any),
            ],
        }]);
        let entry = find_kernel(&test.disk).unwrap_or_else(|error| panic!("{script}: {error}"));
        let [found, found_command_line, _] = describe(&test.disk, &entry);
        assert_eq!(
            (found.replace("vda1:", "").as_str(), found_command_line.as_str()),
            (files, command_line),
            "{script}"
        );
    }
}
