//! Errors, and files that are refused.

use std::time::Instant;

use nutshell_disk_reader::{MAX_KERNEL_SIZE, find_kernel};

use crate::harness::Content::{Any, Bytes, Directory, Empty, Fifo, Link, Sparse, Text};
use crate::harness::{Files, Tree, assert_not_found, build_until, image, tree};

fn ext4<'t>(files: Files<'t>) -> [Tree<'t>; 1] {
    [tree("vda1", "ext4", "u", files)]
}

#[test]
fn error_names_what_was_looked_for_and_found() {
    let kernel = |kernel| {
        [
            ("/boot/grub/grub.cfg", Text("menuentry x { linux /k }")),
            ("/k", kernel),
        ]
    };
    assert_not_found(
        "no file system",
        &[],
        &["no file system that can be mounted", "grub.cfg", "/boot/vmlinuz-*"],
    );
    assert_not_found("empty", &ext4(&[]), &["in vda1 (ext4)", "none of them exists"]);
    for (name, content, reason) in [
        ("directory", Directory, "the kernel /k on vda1 is a directory"),
        ("FIFO", Fifo, "the kernel /k on vda1 is a FIFO"),
        ("empty file", Empty, "the kernel /k on vda1 is empty"),
        ("device", Link("/dev/null"), "the kernel /k on vda1 does not exist"),
        ("loop", Link("k"), "the kernel /k on vda1 is a loop"),
        (
            "link to the outside",
            Link("../../../../../../etc/passwd"),
            "does not exist",
        ),
        (
            "huge kernel",
            Sparse(MAX_KERNEL_SIZE + 1),
            "more than the limit of 268435456",
        ),
    ] {
        assert_not_found(name, &ext4(&kernel(content)), &["/boot/grub/grub.cfg on vda1", reason]);
    }
    for (name, files, reason) in [
        (
            "huge configuration",
            [("/boot/grub/grub.cfg", Sparse(1 << 40))],
            "has 1099511627776 bytes",
        ),
        (
            "configuration that is a FIFO",
            [("/boot/extlinux.conf", Fifo)],
            "/boot/extlinux.conf on vda1 is a FIFO",
        ),
        (
            "entries that are a file",
            [("/loader/entries", Any)],
            "none of them exists",
        ),
        (
            "entry that is a FIFO",
            [("/loader/entries/a.conf", Fifo)],
            "a.conf on vda1 is a FIFO",
        ),
        (
            "entry without a kernel",
            [("/loader/entries/a.conf", Text("efi /x.efi"))],
            "has no key `linux`",
        ),
        (
            "no entries",
            [("/boot/grub/grub.cfg", Text("set a=b"))],
            "has no menu entries",
        ),
        (
            "syntax",
            [("/boot/grub/grub.cfg", Text("\nif x"))],
            "grub.cfg on vda1: line 2: `then` is missing",
        ),
        (
            "Windows",
            [("/boot/grub/grub.cfg", Text("menuentry w { chainloader +1 }"))],
            "entry \"w\" loads no Linux",
        ),
        (
            "kernel without root",
            [("/boot/vmlinuz-1", Any)],
            "no root file system: none has an os-release file",
        ),
    ] {
        assert_not_found(name, &ext4(&files), &[reason]);
    }
    let other = image(&[(".text", b"x")]);
    assert_not_found(
        "program for EFI",
        &[tree(
            "vda1",
            "vfat",
            "",
            &[("/EFI/Linux/a.efi", Bytes(&other)), ("/EFI/Linux/b.efi", Text("MZ"))],
        )],
        &[
            "/EFI/Linux/a.efi on vda1 is a program for EFI without a section .linux",
            "b.efi on vda1 is not a PE file",
        ],
    );
    let long = format!("menuentry x {{ linux /k {} }}", "x".repeat(5000));
    for (name, configuration, reason) in [
        (
            "long command line",
            long.as_str(),
            "the command line is longer than 4096 bytes",
        ),
        (
            "control character",
            "menuentry x { linux /k '\x07' }",
            "the command line has the character '\\u{7}'",
        ),
        (
            "many initrds",
            "menuentry x { linux /k\ninitrd /k /k /k /k /k /k /k /k /k /k /k /k /k /k /k /k /k }",
            "17 initrds",
        ),
        (
            "missing initrd",
            "menuentry x { linux /k\ninitrd /i }",
            "the initrd /i on vda1 does not exist",
        ),
    ] {
        assert_not_found(
            name,
            &ext4(&[("/boot/grub/grub.cfg", Text(configuration)), ("/k", Any)]),
            &[reason],
        );
    }
    let terminal = "menuentry '\x1b[31mred\n' { true }";
    assert_not_found(
        "escape sequences",
        &ext4(&[("/boot/grub/grub.cfg", Text(terminal))]),
        &["red"],
    );
}

#[test]
fn nothing_is_read_after_the_deadline() {
    let files = [("/boot/grub/grub.cfg", Text("menuentry x { linux /k }")), ("/k", Any)];
    let test = build_until(&[tree("vda1", "ext4", "u", &files)], Instant::now());
    assert!(find_kernel(&test.disk).is_err());
}

#[test]
fn scripts_of_grub_end_at_limits() {
    let double = format!("x=0123456789\n{}", "x=$x$x\n".repeat(100));
    let nested_loops = format!(
        "{} x=y {}",
        "for a in 1 2 3 4 5 6 7 8 9 0; do\n".repeat(10),
        "\ndone".repeat(10)
    );
    let submenus = format!("{}{}", "submenu s {\n".repeat(20), "}\n".repeat(20));
    for (script, reason) in [
        ("function f {\nf\n}\nf", "the limit of nested calls is reached"),
        ("source $config_file", "the limit of nested calls is reached"),
        ("configfile $config_file", "the limit of nested calls is reached"),
        ("menuentry x {\nsource $config_file\n}", "loads no Linux kernel"),
        (double.as_str(), "the limit of the length of a command is reached"),
        (nested_loops.as_str(), "the limit of executed commands is reached"),
        (submenus.as_str(), "menus are nested more than 4 deep"),
    ] {
        let files = [("/boot/grub/grub.cfg", Text(script))];
        assert_not_found(script, &ext4(&files), &[reason]);
    }
}
