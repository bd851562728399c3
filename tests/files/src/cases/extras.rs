//! Extended attributes, access control lists, locks, device nodes and the numbers of the file system.

use std::os::unix::fs::symlink;

use rustix::{
    fs::{
        CWD, FileType, FlockOperation, Mode, OFlags, XattrFlags, flock, getxattr, lgetxattr, listxattr, makedev,
        mknodat, open, removexattr, setxattr, statvfs,
    },
    io::Errno,
};

use crate::place::{Case, OWNER, Outcome, Place, STRANGER, ensure, equal, mode, refused, run_as, status, text};

pub(crate) const CASES: &[Case] = &[
    ("extended attributes are kept", extended_attributes_are_kept),
    ("extended attributes are protected", extended_attributes_are_protected),
    ("access control list gives a right", access_control_list_gives_a_right),
    (
        "default access control list is inherited",
        default_access_control_list_is_inherited,
    ),
    ("file capabilities are kept", file_capabilities_are_kept),
    (
        "locks of two descriptors exclude each other",
        locks_of_two_descriptors_exclude_each_other,
    ),
    ("device nodes are created", device_nodes_are_created),
    (
        "file system has a size and a length of names",
        file_system_has_a_size_and_a_length_of_names,
    ),
];

fn extended_attributes_are_kept(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    let set = |name: &str, value: &[u8], flags| setxattr(&file, name, value, flags);
    let get = |name: &str| {
        let mut value = [0; 64];
        getxattr(&file, name, &mut value[..]).map(|length| value[..length].to_vec())
    };
    text(set("user.one", b"1", XattrFlags::CREATE))?;
    refused(set("user.one", b"2", XattrFlags::CREATE), Errno::EXIST)?;
    refused(set("user.two", b"2", XattrFlags::REPLACE), Errno::NODATA)?;
    text(set("user.one", b"\0any\xff", XattrFlags::REPLACE))?;
    equal(text(get("user.one"))?, b"\0any\xff".to_vec())?;
    refused(getxattr(&file, "user.one", &mut [0; 2][..]), Errno::RANGE)?;
    let mut names = [0; 256];
    let length = text(listxattr(&file, &mut names[..]))?;
    ensure(
        names[..length].split(|byte| *byte == 0).any(|name| name == b"user.one"),
        "the name is not listed",
    )?;
    text(removexattr(&file, "user.one"))?;
    refused(get("user.one"), Errno::NODATA)?;
    refused(removexattr(&file, "user.one"), Errno::NODATA)
}

fn extended_attributes_are_protected(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o644)?;
    text(symlink("file", place.at("link")))?;
    run_as(STRANGER, || {
        refused(setxattr(&file, "user.x", b"", XattrFlags::empty()), Errno::ACCESS)
    })?;
    run_as(OWNER, || {
        text(setxattr(&file, "user.x", b"", XattrFlags::empty()))?;
        refused(setxattr(&file, "trusted.x", b"", XattrFlags::empty()), Errno::PERM)
    })?;
    let of_the_link = lgetxattr(place.at("link"), "user.x", &mut [0; 8][..]);
    ensure(of_the_link.is_err(), "the link has the attribute of its target")
}

/// An entry of an access control list as the attribute has it (include/uapi/linux/posix_acl_xattr.h): tag, permissions
/// and id.
type AclEntry = (u16, u16, u32);

const USER_OBJECT: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJECT: u16 = 4;
const MASK: u16 = 16;
const OTHER: u16 = 32;
const NO_ID: u32 = u32::MAX;

fn encode_acl(entries: &[AclEntry]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Gives the user [`STRANGER`] all rights, and others none.
fn acl_of_stranger() -> Vec<u8> {
    encode_acl(&[
        (USER_OBJECT, 6, NO_ID),
        (USER, 7, STRANGER),
        (GROUP_OBJECT, 0, NO_ID),
        (MASK, 7, NO_ID),
        (OTHER, 0, NO_ID),
    ])
}

fn access_control_list_gives_a_right(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o600)?;
    let try_open = || run_as(STRANGER, || Ok(open(&file, OFlags::RDWR, Mode::empty()).map(drop)));
    refused(try_open()?, Errno::ACCESS)?;
    text(setxattr(
        &file,
        "system.posix_acl_access",
        &acl_of_stranger(),
        XattrFlags::empty(),
    ))?;
    text(try_open()?)?;
    equal(mode(&file)?, 0o670)
}

fn default_access_control_list_is_inherited(place: &Place) -> Outcome {
    let directory = place.directory_of("directory", OWNER, OWNER, 0o777)?;
    text(setxattr(
        &directory,
        "system.posix_acl_default",
        &acl_of_stranger(),
        XattrFlags::empty(),
    ))?;
    text(std::fs::write(directory.join("file"), ""))?;
    let mut acl = [0; 256];
    text(getxattr(
        directory.join("file"),
        "system.posix_acl_access",
        &mut acl[..],
    ))?;
    equal(mode(&directory.join("file"))?, 0o660)
}

fn file_capabilities_are_kept(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    // Version 2 with CAP_NET_BIND_SERVICE permitted and effective (include/uapi/linux/capability.h).
    let words = [0x0200_0001_u32, 1 << 10, 0, 0, 0];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    text(setxattr(&file, "security.capability", &value, XattrFlags::empty()))?;
    let mut read = [0; 64];
    let length = text(getxattr(&file, "security.capability", &mut read[..]))?;
    equal(&read[..length], &value[..])?;
    text(std::fs::write(&file, "text"))?;
    refused(getxattr(&file, "security.capability", &mut read[..]), Errno::NODATA)
}

fn locks_of_two_descriptors_exclude_each_other(place: &Place) -> Outcome {
    place.file("file", "")?;
    let open = || text(open(place.at("file"), OFlags::RDWR, Mode::empty()));
    let (one, other) = (open()?, open()?);
    text(flock(&one, FlockOperation::LockShared))?;
    text(flock(&other, FlockOperation::LockShared))?;
    refused(
        flock(&other, FlockOperation::NonBlockingLockExclusive),
        Errno::WOULDBLOCK,
    )?;
    drop(one);
    text(flock(&other, FlockOperation::NonBlockingLockExclusive))
}

fn device_nodes_are_created(place: &Place) -> Outcome {
    for (name, kind, device) in [
        ("null", FileType::CharacterDevice, makedev(1, 3)),
        ("loop", FileType::BlockDevice, makedev(7, 0)),
    ] {
        text(mknodat(CWD, place.at(name), kind, Mode::from_raw_mode(0o600), device))?;
        let status = status(&place.at(name))?;
        equal(
            (FileType::from_raw_mode(status.st_mode), status.st_rdev),
            (kind, device),
        )?;
    }
    Ok(())
}

fn file_system_has_a_size_and_a_length_of_names(place: &Place) -> Outcome {
    let numbers = text(statvfs(place.at("")))?;
    equal(numbers.f_namemax, 255)?;
    ensure(
        numbers.f_bsize > 0 && numbers.f_blocks > 0,
        "the file system has no size",
    )
}
