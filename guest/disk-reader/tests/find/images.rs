//! Unified kernel images.

use nutshell_disk_reader::find_kernel;

use crate::harness::Content::{Any, Bytes, Text};
use crate::harness::{assert_found, build, image, tree};

#[test]
fn unified_kernel_images_are_found() {
    let build_image = |version: &str, command_line: &[u8]| {
        let release = format!("ID=fedora\nVERSION_ID=\"{version}\"\n");
        image(&[
            (".osrel", release.as_bytes()),
            (".cmdline", command_line),
            (".initrd", b"initrd"),
            (".linux", b"kernel"),
        ])
    };
    let (old, new) = (build_image("42", b"old"), build_image("43", b"root=LABEL=x ro\n\0"));
    let truncated = &new[..new.len() - 512];
    let profiles = image(&[
        (".linux", b"kernel"),
        (".cmdline", b"all"),
        (".profile", b"ID=a"),
        (".cmdline", b"first"),
        (".profile", b"ID=b"),
        (".cmdline", b"second"),
    ]);
    let found = |name: &str, command_line: &str| {
        [
            format!("vda1:/EFI/Linux/{name} vda1:/EFI/Linux/{name}"),
            command_line.to_owned(),
            format!("the unified kernel image /EFI/Linux/{name} on vda1"),
        ]
    };
    for (name, files, [expected_files, command_line, source]) in [
        (
            "the newest release",
            &[("/EFI/Linux/z.efi", Bytes(&old)), ("/EFI/Linux/a.efi", Bytes(&new))][..],
            found("a.efi", "root=LABEL=x ro"),
        ),
        (
            "the newest name of the same release",
            &[
                ("/EFI/Linux/m-6.9.efi", Bytes(&old)),
                ("/EFI/Linux/m-6.10.efi", Bytes(&old)),
            ],
            found("m-6.10.efi", "old"),
        ),
        (
            "an image that has attempts left",
            &[("/EFI/Linux/a+0-3.efi", Bytes(&new)), ("/EFI/Linux/b.efi", Bytes(&old))],
            found("b.efi", "old"),
        ),
        (
            "the pattern in loader.conf",
            &[
                ("/loader/loader.conf", Text("default z*.efi")),
                ("/EFI/Linux/z.efi", Bytes(&old)),
                ("/EFI/Linux/a.efi", Bytes(&new)),
            ],
            found("z.efi", "old"),
        ),
        (
            "a whole image beside a truncated one",
            &[
                ("/EFI/Linux/z.efi", Bytes(truncated)),
                ("/EFI/Linux/a.EFI", Bytes(&old)),
            ],
            found("a.EFI", "old"),
        ),
    ] {
        let trees = [tree("vda1", "vfat", "AAAA-BBBB", files)];
        assert_found(name, &trees, [&expected_files, &command_line, &source]);
    }
    assert_found(
        "the first profile",
        &[tree("vda1", "vfat", "", &[("/EFI/Linux/a.efi", Bytes(&profiles))])],
        [
            "vda1:/EFI/Linux/a.efi",
            "first",
            "the unified kernel image /EFI/Linux/a.efi on vda1",
        ],
    );
    assert_found(
        "an entry of type 1 that loader.conf selects",
        &[tree(
            "vda1",
            "vfat",
            "",
            &[
                ("/EFI/Linux/a.efi", Bytes(&new)),
                ("/loader/loader.conf", Text("default b.conf")),
                ("/loader/entries/b.conf", Text("linux /b")),
                ("/b", Any),
            ],
        )],
        ["vda1:/b", "", "the boot loader entry /loader/entries/b.conf on vda1"],
    );
}

#[test]
fn sections_of_a_unified_kernel_image_are_its_files() {
    let bytes = image(&[(".linux", b"the kernel"), (".initrd", b"the initrd")]);
    let test = build(&[tree("vda1", "vfat", "", &[("/EFI/Linux/a.efi", Bytes(&bytes))])]);
    let entry = find_kernel(&test.disk).unwrap();
    for (file, expected) in [(&entry.kernel, "the kernel"), (&entry.initrds[0], "the initrd")] {
        let range = usize::try_from(file.offset).unwrap()..usize::try_from(file.offset + file.size).unwrap();
        assert_eq!(bytes[range], *expected.as_bytes());
    }
}
