//! Contents: open flags, sizes, holes, times and mappings.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, symlink},
    ptr,
};

use rustix::{
    fs::{
        AtFlags, CWD, FallocateFlags, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fallocate, ftruncate,
        open, utimensat,
    },
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::place::{
    Case, OWNER, Outcome, Place, STRANGER, changed, ensure, equal, modified, refused, run_as, status, text,
    wait_for_the_next_tick,
};

pub(crate) const CASES: &[Case] = &[
    ("open flags are obeyed", open_flags_are_obeyed),
    ("appended bytes come last", appended_bytes_come_last),
    ("file grows with zeros and shrinks", file_grows_with_zeros_and_shrinks),
    ("sizes that no file has are refused", sizes_that_no_file_has_are_refused),
    ("file has a size beyond 4 GiB", file_has_a_size_beyond_4_gib),
    (
        "descriptor without the right is refused",
        descriptor_without_the_right_is_refused,
    ),
    ("write changes the times", write_changes_the_times),
    ("times are set with nanoseconds", times_are_set_with_nanoseconds),
    ("others set no times", others_set_no_times),
    (
        "space is reserved, and holes are made",
        space_is_reserved_and_holes_are_made,
    ),
    ("holes are found", holes_are_found),
    ("range is copied", range_is_copied),
    (
        "mapping and file have the same contents",
        mapping_and_file_have_the_same_contents,
    ),
    (
        "two descriptors see each other's writes",
        two_descriptors_see_each_others_writes,
    ),
    ("contents of 8 MiB are kept", contents_of_8_mib_are_kept),
    ("unnamed file gets a name", unnamed_file_gets_a_name),
];

fn read_write(place: &Place, name: &str) -> Result<File, String> {
    let flags = OFlags::RDWR | OFlags::CREATE;
    Ok(text(open(place.at(name), flags, Mode::from_raw_mode(0o644)))?.into())
}

fn open_flags_are_obeyed(place: &Place) -> Outcome {
    let file = place.file("file", "text")?;
    text(fs::create_dir(place.at("directory")))?;
    text(symlink("file", place.at("link")))?;
    let open = |name: &str, flags| open(place.at(name), flags, Mode::from_raw_mode(0o644));
    refused(open("file", OFlags::RDONLY | OFlags::DIRECTORY), Errno::NOTDIR)?;
    refused(open("link", OFlags::RDONLY | OFlags::NOFOLLOW), Errno::LOOP)?;
    refused(open("directory", OFlags::WRONLY), Errno::ISDIR)?;
    refused(open("directory", OFlags::RDONLY | OFlags::CREATE), Errno::ISDIR)?;
    refused(open("missing", OFlags::RDONLY), Errno::NOENT)?;
    text(open("link", OFlags::WRONLY | OFlags::TRUNC))?;
    equal(status(&file)?.st_size, 0)
}

fn appended_bytes_come_last(place: &Place) -> Outcome {
    place.file("file", "first ")?;
    let append = || text(open(place.at("file"), OFlags::WRONLY | OFlags::APPEND, Mode::empty())).map(File::from);
    let (mut one, mut other) = (append()?, append()?);
    for _ in 0..3 {
        text(one.write_all(b"one "))?;
        text(other.write_all(b"other "))?;
    }
    equal(
        text(fs::read_to_string(place.at("file")))?,
        "first one other one other one other ".to_owned(),
    )
}

fn file_grows_with_zeros_and_shrinks(place: &Place) -> Outcome {
    let file = read_write(place, "file")?;
    text(file.write_all_at(b"text", 0))?;
    text(ftruncate(&file, 2))?;
    text(ftruncate(&file, 6))?;
    equal(text(fs::read(place.at("file")))?, b"te\0\0\0\0".to_vec())?;
    text(file.write_all_at(b"end", 10_000))?;
    let contents = text(fs::read(place.at("file")))?;
    equal(contents.len(), 10_003)?;
    ensure(
        contents[6..10_000].iter().all(|byte| *byte == 0),
        "a byte of the hole is not 0",
    )
}

fn sizes_that_no_file_has_are_refused(place: &Place) -> Outcome {
    let file = read_write(place, "file")?;
    refused(ftruncate(&file, u64::MAX), Errno::INVAL)
}

fn file_has_a_size_beyond_4_gib(place: &Place) -> Outcome {
    let mut file = read_write(place, "file")?;
    let offset = (5 << 30) + 1;
    text(file.write_all_at(b"end", offset))?;
    equal(text(file.seek(SeekFrom::End(-3)))?, offset)?;
    let mut end = String::new();
    text(file.read_to_string(&mut end))?;
    equal(end, "end".to_owned())?;
    ensure(status(&place.at("file"))?.st_blocks < 1 << 20, "the hole takes space")
}

fn descriptor_without_the_right_is_refused(place: &Place) -> Outcome {
    place.file("file", "text")?;
    let open = |flags| text(open(place.at("file"), flags, Mode::empty()));
    let (reader, writer) = (open(OFlags::RDONLY)?, open(OFlags::WRONLY)?);
    refused(rustix::io::write(&reader, b"x"), Errno::BADF)?;
    refused(rustix::io::read(&writer, &mut [0; 1]), Errno::BADF)?;
    refused(ftruncate(&reader, 0), Errno::INVAL)
}

fn write_changes_the_times(place: &Place) -> Outcome {
    let file = read_write(place, "file")?;
    let path = place.at("file");
    let changes: [(&str, &dyn Fn() -> std::io::Result<()>); 2] = [
        ("write", &|| file.write_all_at(b"text", 0)),
        ("truncation", &|| file.set_len(1)),
    ];
    for (name, change) in changes {
        let before = (modified(&path)?, changed(&path)?);
        wait_for_the_next_tick();
        text(change())?;
        let after = (modified(&path)?, changed(&path)?);
        ensure(
            after.0 > before.0 && after.1 > before.1,
            &format!("{name} does not change a time"),
        )?;
    }
    Ok(())
}

fn times(access: Timespec, modification: Timespec) -> Timestamps {
    Timestamps {
        last_access: access,
        last_modification: modification,
    }
}

fn time(tv_sec: i64, tv_nsec: i64) -> Timespec {
    Timespec { tv_sec, tv_nsec }
}

fn times_are_set_with_nanoseconds(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    text(symlink("file", place.at("link")))?;
    text(utimensat(
        CWD,
        &file,
        &times(time(1, 2), time(1_000_000_000, 123_456_789)),
        AtFlags::empty(),
    ))?;
    let set = status(&file)?;
    equal((set.st_atime, set.st_atime_nsec), (1, 2))?;
    equal(modified(&file)?, (1_000_000_000, 123_456_789))?;
    text(utimensat(
        CWD,
        &file,
        &times(time(0, UTIME_OMIT), time(5, 6)),
        AtFlags::empty(),
    ))?;
    equal((status(&file)?.st_atime, modified(&file)?), (1, (5, 6)))?;
    text(utimensat(
        CWD,
        &file,
        &times(time(0, UTIME_OMIT), time(0, UTIME_NOW)),
        AtFlags::empty(),
    ))?;
    ensure(modified(&file)?.0 > 1_000_000_000, "the time is not the current one")?;
    let of_the_link = times(time(7, 0), time(8, 0));
    text(utimensat(
        CWD,
        place.at("link"),
        &of_the_link,
        AtFlags::SYMLINK_NOFOLLOW,
    ))?;
    equal(modified(&place.at("link"))?, (8, 0))
}

fn others_set_no_times(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o666)?;
    let read_only = place.file_of("read-only", OWNER, OWNER, 0o444)?;
    let (explicit, now) = (
        times(time(1, 0), time(1, 0)),
        times(time(0, UTIME_NOW), time(0, UTIME_NOW)),
    );
    run_as(STRANGER, || {
        refused(utimensat(CWD, &file, &explicit, AtFlags::empty()), Errno::PERM)?;
        text(utimensat(CWD, &file, &now, AtFlags::empty()))?;
        refused(utimensat(CWD, &read_only, &now, AtFlags::empty()), Errno::ACCESS)
    })?;
    run_as(OWNER, || text(utimensat(CWD, &read_only, &explicit, AtFlags::empty())))
}

fn space_is_reserved_and_holes_are_made(place: &Place) -> Outcome {
    let file = read_write(place, "file")?;
    text(fallocate(&file, FallocateFlags::empty(), 0, 1 << 20))?;
    equal(text(file.metadata())?.len(), 1 << 20)?;
    text(fallocate(&file, FallocateFlags::KEEP_SIZE, 1 << 20, 1 << 20))?;
    equal(text(file.metadata())?.len(), 1 << 20)?;
    text(file.write_all_at(&[1; 12_288], 0))?;
    text(fallocate(
        &file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        4096,
        4096,
    ))?;
    let mut contents = vec![0; 12_288];
    text(file.read_exact_at(&mut contents, 0))?;
    let zeros = contents.iter().filter(|byte| **byte == 0).count();
    equal((zeros, contents[4095], contents[8192]), (4096, 1, 1))
}

fn holes_are_found(place: &Place) -> Outcome {
    let file = read_write(place, "file")?;
    text(file.write_all_at(&[1; 4096], 1 << 20))?;
    text(ftruncate(&file, 4 << 20))?;
    let seek = |from| rustix::fs::seek(&file, from);
    let data = text(seek(rustix::fs::SeekFrom::Data(0)))?;
    ensure(data <= 1 << 20, "the data begins too late")?;
    let hole = text(seek(rustix::fs::SeekFrom::Hole(1 << 20)))?;
    ensure(
        ((1 << 20) + 4096..=4 << 20).contains(&hole),
        "the hole is at a wrong place",
    )?;
    refused(seek(rustix::fs::SeekFrom::Data(4 << 20)), Errno::NXIO)
}

fn range_is_copied(place: &Place) -> Outcome {
    let (source, target) = (read_write(place, "source")?, read_write(place, "target")?);
    text(source.write_all_at(b"0123456789", 0))?;
    let (mut from, mut to) = (2, 1);
    let copied = text(rustix::fs::copy_file_range(
        &source,
        Some(&mut from),
        &target,
        Some(&mut to),
        5,
    ))?;
    equal(copied, 5)?;
    equal(text(fs::read(place.at("target")))?, b"\x0023456".to_vec())
}

fn mapping_and_file_have_the_same_contents(place: &Place) -> Outcome {
    const SIZE: usize = 8192;
    let file = read_write(place, "file")?;
    text(file.write_all_at(&[b'a'; SIZE], 0))?;
    // SAFETY: the kernel chooses the address, and nothing else has this mapping, which is unmapped below.
    let address = text(unsafe {
        mmap(
            ptr::null_mut(),
            SIZE,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &file,
            0,
        )
    })?;
    text(file.write_all_at(b"written", 4096))?;
    // SAFETY: both are inside of the mapping, whose file is not truncated.
    let seen = unsafe {
        ptr::write_volatile(address.cast::<u8>().add(1), b'm');
        ptr::read_volatile(address.cast::<u8>().add(4096))
    };
    let mut first = [0; 2];
    let read = file.read_exact_at(&mut first, 0);
    // SAFETY: nothing refers to the mapping any more.
    text(unsafe { munmap(address, SIZE) })?;
    text(read)?;
    equal((seen, first), (b'w', *b"am"))
}

fn two_descriptors_see_each_others_writes(place: &Place) -> Outcome {
    let (one, other) = (read_write(place, "file")?, read_write(place, "file")?);
    for number in 0..100_u64 {
        text(one.write_all_at(&number.to_ne_bytes(), 0))?;
        let mut bytes = [0; 8];
        text(other.read_exact_at(&mut bytes, 0))?;
        equal(u64::from_ne_bytes(bytes), number)?;
    }
    Ok(())
}

fn contents_of_8_mib_are_kept(place: &Place) -> Outcome {
    let contents: Vec<_> = (0..2_u32 << 20)
        .flat_map(|number| number.wrapping_mul(2_654_435_761).to_ne_bytes())
        .collect();
    let mut file = read_write(place, "file")?;
    for part in contents.chunks(100_003) {
        text(file.write_all(part))?;
    }
    text(file.sync_all())?;
    ensure(
        text(fs::read(place.at("file")))? == contents,
        "other bytes were read than written",
    )
}

fn unnamed_file_gets_a_name(place: &Place) -> Outcome {
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = text(open(place.at(""), flags, Mode::from_raw_mode(0o644)))?;
    text(rustix::io::write(&file, b"text"))?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    text(rustix::fs::linkat(
        CWD,
        path,
        CWD,
        place.at("named"),
        AtFlags::SYMLINK_FOLLOW,
    ))?;
    equal(text(fs::read_to_string(place.at("named")))?, "text".to_owned())
}
