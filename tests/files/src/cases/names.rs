//! Names: creation, links, renames and removal of files and directories.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    io::Read,
    os::unix::{ffi::OsStrExt, fs::symlink},
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, link, mkdir, mknodat, open, readlink, rename, renameat_with,
        rmdir, unlink, unlinkat,
    },
    io::Errno,
};

use crate::place::{
    Case, Outcome, Place, changed, ensure, equal, modified, refused, status, text, wait_for_the_next_tick,
};

pub(crate) const CASES: &[Case] = &[
    ("name has at most 255 bytes", name_has_at_most_255_bytes),
    ("path has at most 4095 bytes", path_has_at_most_4095_bytes),
    ("name may have any bytes", name_may_have_any_bytes),
    (
        "missing parts of a path are named by errors",
        missing_parts_of_a_path_are_named_by_errors,
    ),
    ("loop of links is refused", loop_of_links_is_refused),
    ("existing name is not created again", existing_name_is_not_created_again),
    ("link keeps its text", link_keeps_its_text),
    ("hard link is the same file", hard_link_is_the_same_file),
    ("directory has no hard link", directory_has_no_hard_link),
    ("hard link of a link is a link", hard_link_of_a_link_is_a_link),
    ("pipe and socket are created", pipe_and_socket_are_created),
    (
        "new name changes the times of its directory",
        new_name_changes_the_times_of_its_directory,
    ),
    ("rename replaces a file", rename_replaces_a_file),
    (
        "rename replaces an empty directory only",
        rename_replaces_an_empty_directory_only,
    ),
    (
        "rename does not mix files and directories",
        rename_does_not_mix_files_and_directories,
    ),
    (
        "directory does not move into itself",
        directory_does_not_move_into_itself,
    ),
    (
        "rename to another link of the file does nothing",
        rename_to_another_link_of_the_file_does_nothing,
    ),
    (
        "rename without replacement is refused",
        rename_without_replacement_is_refused,
    ),
    ("names are exchanged", names_are_exchanged),
    (
        "renamed directory keeps its files and its parent",
        renamed_directory_keeps_its_files_and_its_parent,
    ),
    (
        "removed file is usable while it is open",
        removed_file_is_usable_while_it_is_open,
    ),
    (
        "replaced file is usable while it is open",
        replaced_file_is_usable_while_it_is_open,
    ),
    ("only an empty directory is removed", only_an_empty_directory_is_removed),
    ("removed name can be used again", removed_name_can_be_used_again),
    ("removal of a link counts down", removal_of_a_link_counts_down),
    (
        "directory lists each of 3000 names once",
        directory_lists_each_of_3000_names_once,
    ),
    (
        "directory is emptied while it is read",
        directory_is_emptied_while_it_is_read,
    ),
];

const CREATE: OFlags = OFlags::CREATE.union(OFlags::WRONLY);

fn bits(mode: u32) -> Mode {
    Mode::from_raw_mode(mode)
}

fn name_has_at_most_255_bytes(place: &Place) -> Outcome {
    let (longest, too_long) = ("n".repeat(255), "n".repeat(256));
    text(open(place.at(&longest), CREATE, bits(0o644)))?;
    text(rename(place.at(&longest), place.at("short")))?;
    text(mkdir(place.at(&longest), bits(0o755)))?;
    refused(open(place.at(&too_long), CREATE, bits(0o644)), Errno::NAMETOOLONG)?;
    refused(mkdir(place.at(&too_long), bits(0o755)), Errno::NAMETOOLONG)?;
    refused(rustix::fs::stat(place.at(&too_long)), Errno::NAMETOOLONG)?;
    refused(rename(place.at("short"), place.at(&too_long)), Errno::NAMETOOLONG)?;
    refused(link(place.at("short"), place.at(&too_long)), Errno::NAMETOOLONG)?;
    refused(unlink(place.at(&too_long)), Errno::NAMETOOLONG)
}

fn path_has_at_most_4095_bytes(place: &Place) -> Outcome {
    let directory = text(open(place.at(""), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()))?;
    let longest = "./".repeat(2047) + "f";
    text(rustix::fs::openat(&directory, &longest, CREATE, bits(0o644)))?;
    let too_long = "./".repeat(2048) + "f";
    refused(
        rustix::fs::openat(&directory, &too_long, CREATE, bits(0o644)),
        Errno::NAMETOOLONG,
    )
}

fn name_may_have_any_bytes(place: &Place) -> Outcome {
    let names = [&b"\xff\xfe"[..], b" ", b"\n", b"...", b"\\", b"*", "\u{e9}".as_bytes()];
    for name in names {
        text(fs::write(place.at(OsStr::from_bytes(name)), name))?;
    }
    let listed: BTreeSet<_> = text(fs::read_dir(place.at("")))?
        .map(|entry| text(entry).map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    equal(listed, names.map(|name| OsStr::from_bytes(name).to_owned()).into())
}

fn missing_parts_of_a_path_are_named_by_errors(place: &Place) -> Outcome {
    place.file("file", "")?;
    for (path, error) in [("missing/name", Errno::NOENT), ("file/name", Errno::NOTDIR)] {
        let path = place.at(path);
        refused(open(&path, CREATE, bits(0o644)), error)?;
        refused(mkdir(&path, bits(0o755)), error)?;
        refused(rmdir(&path), error)?;
        refused(unlink(&path), error)?;
        refused(rename(&path, place.at("new")), error)?;
        refused(rename(place.at("file"), &path), error)?;
        refused(link(place.at("file"), &path), error)?;
        refused(rustix::fs::symlink("x", &path), error)?;
        refused(rustix::fs::stat(&path), error)?;
        refused(rustix::fs::chmod(&path, bits(0o644)), error)?;
    }
    refused(open(place.at("file/"), OFlags::RDONLY, Mode::empty()), Errno::NOTDIR)?;
    refused(open(place.at("new/"), CREATE, bits(0o644)), Errno::ISDIR)?;
    text(mkdir(place.at("new/"), bits(0o755)))
}

fn loop_of_links_is_refused(place: &Place) -> Outcome {
    text(symlink("second", place.at("first")))?;
    text(symlink("first", place.at("second")))?;
    refused(rustix::fs::stat(place.at("first")), Errno::LOOP)?;
    refused(open(place.at("first"), CREATE, bits(0o644)), Errno::LOOP)?;
    refused(rustix::fs::chmod(place.at("first/name"), bits(0o644)), Errno::LOOP)
}

fn existing_name_is_not_created_again(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    text(mkdir(place.at("directory"), bits(0o755)))?;
    text(symlink("nothing", place.at("dangling")))?;
    for name in ["file", "directory", "dangling"] {
        let path = place.at(name);
        refused(open(&path, CREATE | OFlags::EXCL, bits(0o644)), Errno::EXIST)?;
        refused(mkdir(&path, bits(0o755)), Errno::EXIST)?;
        refused(rustix::fs::symlink("x", &path), Errno::EXIST)?;
        refused(link(&file, &path), Errno::EXIST)?;
        refused(mknodat(CWD, &path, FileType::Fifo, bits(0o644), 0), Errno::EXIST)?;
    }
    // Without O_EXCL, the target is created.
    text(open(place.at("dangling"), CREATE, bits(0o644)))?;
    ensure(place.at("nothing").exists(), "the target of the link was not created")
}

fn link_keeps_its_text(place: &Place) -> Outcome {
    for target in ["x", "/absolute//path/..", &"long/".repeat(800)] {
        text(symlink(target, place.at("link")))?;
        let read = text(readlink(place.at("link"), Vec::new()))?;
        equal(read.as_bytes(), target.as_bytes())?;
        equal(usize::try_from(status(&place.at("link"))?.st_size), Ok(target.len()))?;
        text(unlink(place.at("link")))?;
    }
    let file = place.file("file", "")?;
    refused(readlink(&file, Vec::new()), Errno::INVAL)?;
    refused(rustix::fs::symlink("", place.at("empty")), Errno::NOENT)?;
    refused(
        rustix::fs::symlink("x".repeat(4096), place.at("too-long")),
        Errno::NAMETOOLONG,
    )
}

fn hard_link_is_the_same_file(place: &Place) -> Outcome {
    let (file, other) = (place.file("file", "")?, place.at("other"));
    let before = changed(&file)?;
    wait_for_the_next_tick();
    text(link(&file, &other))?;
    let [first, second] = [status(&file)?, status(&other)?];
    equal((first.st_nlink, first.st_ino), (2, second.st_ino))?;
    ensure(changed(&file)? > before, "the change time is the same")?;
    text(fs::write(&other, "text"))?;
    equal(text(fs::read_to_string(&file))?, "text".to_owned())?;
    refused(link(place.at("missing"), place.at("third")), Errno::NOENT)
}

fn directory_has_no_hard_link(place: &Place) -> Outcome {
    text(mkdir(place.at("directory"), bits(0o755)))?;
    refused(link(place.at("directory"), place.at("other")), Errno::PERM)
}

fn hard_link_of_a_link_is_a_link(place: &Place) -> Outcome {
    place.file("file", "")?;
    text(symlink("file", place.at("link")))?;
    text(link(place.at("link"), place.at("other")))?;
    equal(status(&place.at("other"))?.st_ino, status(&place.at("link"))?.st_ino)
}

fn pipe_and_socket_are_created(place: &Place) -> Outcome {
    for (name, kind) in [("pipe", FileType::Fifo), ("socket", FileType::Socket)] {
        text(mknodat(CWD, place.at(name), kind, bits(0o640), 0))?;
        let status = status(&place.at(name))?;
        equal(FileType::from_raw_mode(status.st_mode), kind)?;
        equal(status.st_mode & 0o7777, 0o640)?;
    }
    refused(open(place.at("socket"), OFlags::RDWR, Mode::empty()), Errno::NXIO)?;
    let flags = OFlags::WRONLY | OFlags::NONBLOCK;
    refused(open(place.at("pipe"), flags, Mode::empty()), Errno::NXIO)
}

fn new_name_changes_the_times_of_its_directory(place: &Place) -> Outcome {
    let directory = place.at("");
    let file = place.file("file", "")?;
    let changes: [(&str, &dyn Fn() -> rustix::io::Result<()>); 6] = [
        ("mkdir", &|| mkdir(place.at("new"), bits(0o755))),
        ("rmdir", &|| rmdir(place.at("new"))),
        ("link", &|| link(&file, place.at("other"))),
        ("rename", &|| rename(place.at("other"), place.at("renamed"))),
        ("symlink", &|| rustix::fs::symlink("x", place.at("link"))),
        ("unlink", &|| unlink(place.at("link"))),
    ];
    for (name, change) in changes {
        let before = (modified(&directory)?, changed(&directory)?);
        wait_for_the_next_tick();
        text(change())?;
        let after = (modified(&directory)?, changed(&directory)?);
        ensure(
            after.0 > before.0 && after.1 > before.1,
            &format!("{name} does not change a time"),
        )?;
    }
    Ok(())
}

fn rename_replaces_a_file(place: &Place) -> Outcome {
    let (new, old) = (place.file("new", "new")?, place.file("old", "old")?);
    let inode = status(&new)?.st_ino;
    text(rename(&new, &old))?;
    equal(text(fs::read_to_string(&old))?, "new".to_owned())?;
    equal(status(&old)?.st_ino, inode)?;
    refused(rustix::fs::lstat(&new), Errno::NOENT)?;
    // A link is replaced, and its target stays.
    text(symlink("old", place.at("link")))?;
    let third = place.file("third", "third")?;
    text(rename(third, place.at("link")))?;
    equal(text(fs::read_to_string(&old))?, "new".to_owned())
}

fn rename_replaces_an_empty_directory_only(place: &Place) -> Outcome {
    for name in ["source", "empty", "full", "full/below"] {
        text(mkdir(place.at(name), bits(0o755)))?;
    }
    refused(rename(place.at("source"), place.at("full")), Errno::NOTEMPTY)?;
    text(rename(place.at("source"), place.at("empty")))?;
    ensure(
        place.at("empty").is_dir() && !place.at("source").exists(),
        "the directory did not move",
    )
}

fn rename_does_not_mix_files_and_directories(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    text(mkdir(place.at("directory"), bits(0o755)))?;
    refused(rename(&file, place.at("directory")), Errno::ISDIR)?;
    refused(rename(place.at("directory"), &file), Errno::NOTDIR)
}

fn directory_does_not_move_into_itself(place: &Place) -> Outcome {
    for name in ["directory", "directory/below"] {
        text(mkdir(place.at(name), bits(0o755)))?;
    }
    refused(
        rename(place.at("directory"), place.at("directory/below/x")),
        Errno::INVAL,
    )?;
    refused(
        rename(place.at("directory/below"), place.at("directory")),
        Errno::NOTEMPTY,
    )
}

fn rename_to_another_link_of_the_file_does_nothing(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    text(link(&file, place.at("other")))?;
    text(rename(&file, place.at("other")))?;
    ensure(file.exists() && place.at("other").exists(), "a name is gone")
}

fn rename_without_replacement_is_refused(place: &Place) -> Outcome {
    let (new, old) = (place.file("new", "")?, place.file("old", "")?);
    let rename = |to: &str| renameat_with(CWD, &new, CWD, place.at(to), RenameFlags::NOREPLACE);
    refused(rename("old"), Errno::EXIST)?;
    text(rename("free"))?;
    ensure(old.exists() && place.at("free").exists(), "a name is gone")
}

fn names_are_exchanged(place: &Place) -> Outcome {
    let file = place.file("file", "text")?;
    text(mkdir(place.at("directory"), bits(0o755)))?;
    let exchange = |to: &str| renameat_with(CWD, &file, CWD, place.at(to), RenameFlags::EXCHANGE);
    refused(exchange("missing"), Errno::NOENT)?;
    text(exchange("directory"))?;
    ensure(
        file.is_dir() && place.at("directory").is_file(),
        "the names have their former files",
    )
}

fn renamed_directory_keeps_its_files_and_its_parent(place: &Place) -> Outcome {
    for name in ["first", "second", "first/moved"] {
        text(mkdir(place.at(name), bits(0o755)))?;
    }
    text(fs::write(place.at("first/moved/file"), "text"))?;
    let opened = text(open(
        place.at("first/moved"),
        OFlags::RDONLY | OFlags::DIRECTORY,
        Mode::empty(),
    ))?;
    text(rename(place.at("first/moved"), place.at("second/moved")))?;
    equal(
        text(fs::read_to_string(place.at("second/moved/file")))?,
        "text".to_owned(),
    )?;
    let parent = text(rustix::fs::statat(&opened, "..", AtFlags::empty()))?;
    equal(parent.st_ino, status(&place.at("second"))?.st_ino)?;
    text(rustix::fs::openat(&opened, "new", CREATE, bits(0o644)))?;
    ensure(place.at("second/moved/new").exists(), "the new file is elsewhere")
}

fn removed_file_is_usable_while_it_is_open(place: &Place) -> Outcome {
    let path = place.file("file", "before")?;
    let file = text(open(&path, OFlags::RDWR, Mode::empty()))?;
    text(unlink(&path))?;
    refused(rustix::fs::lstat(&path), Errno::NOENT)?;
    equal(text(rustix::fs::fstat(&file))?.st_nlink, 0)?;
    equal(text(rustix::io::pwrite(&file, b"after", 6))?, 5)?;
    text(rustix::fs::ftruncate(&file, 9))?;
    text(rustix::fs::fchmod(&file, bits(0o600)))?;
    let mut contents = String::new();
    text(fs::File::from(file).read_to_string(&mut contents))?;
    equal(contents, "beforeaft".to_owned())
}

fn replaced_file_is_usable_while_it_is_open(place: &Place) -> Outcome {
    let (new, old) = (place.file("new", "new")?, place.file("old", "old")?);
    let mut opened = text(fs::File::open(&old))?;
    text(rename(&new, &old))?;
    let mut contents = String::new();
    text(opened.read_to_string(&mut contents))?;
    equal(contents, "old".to_owned())?;
    equal(text(rustix::fs::fstat(&opened))?.st_nlink, 0)
}

fn only_an_empty_directory_is_removed(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    for name in ["full", "full/below"] {
        text(mkdir(place.at(name), bits(0o755)))?;
    }
    refused(rmdir(place.at("full")), Errno::NOTEMPTY)?;
    refused(rmdir(&file), Errno::NOTDIR)?;
    refused(unlink(place.at("full")), Errno::ISDIR)?;
    refused(unlinkat(CWD, &file, AtFlags::REMOVEDIR), Errno::NOTDIR)?;
    refused(rmdir(place.at("full/.")), Errno::INVAL)?;
    refused(rmdir(place.at("full/below/..")), Errno::NOTEMPTY)?;
    text(rmdir(place.at("full/below")))?;
    text(rmdir(place.at("full")))
}

fn removed_name_can_be_used_again(place: &Place) -> Outcome {
    let path = place.at("name");
    for _ in 0..20 {
        text(fs::write(&path, "text"))?;
        text(unlink(&path))?;
        text(mkdir(&path, bits(0o755)))?;
        ensure(path.is_dir(), "the name has its former file")?;
        text(rmdir(&path))?;
        text(symlink("x", &path))?;
        text(unlink(&path))?;
    }
    Ok(())
}

fn removal_of_a_link_counts_down(place: &Place) -> Outcome {
    let (file, other) = (place.file("file", "")?, place.at("other"));
    text(link(&file, &other))?;
    equal(status(&file)?.st_nlink, 2)?;
    let before = changed(&file)?;
    wait_for_the_next_tick();
    text(unlink(&other))?;
    equal(status(&file)?.st_nlink, 1)?;
    ensure(changed(&file)? > before, "the change time is the same")
}

fn directory_lists_each_of_3000_names_once(place: &Place) -> Outcome {
    for number in 0..3000 {
        text(open(place.at(format!("file-{number}")), CREATE, bits(0o644)))?;
    }
    let mut listed = BTreeSet::new();
    for entry in text(fs::read_dir(place.at("")))? {
        let entry = text(entry)?;
        ensure(listed.insert(entry.file_name()), &format!("{entry:?} is listed twice"))?;
        ensure(
            text(entry.file_type())?.is_file(),
            &format!("{entry:?} is listed with another type"),
        )?;
    }
    equal(listed.len(), 3000)
}

fn directory_is_emptied_while_it_is_read(place: &Place) -> Outcome {
    text(mkdir(place.at("directory"), bits(0o755)))?;
    for number in 0..500 {
        text(fs::write(place.at(format!("directory/file-{number}")), ""))?;
    }
    for entry in text(fs::read_dir(place.at("directory")))? {
        text(fs::remove_file(text(entry)?.path()))?;
    }
    text(rmdir(place.at("directory")))
}
