//! Modes, owners, and who may do what.

use std::{fs, os::unix::fs::symlink};

use rustix::{
    fs::{Access, AtFlags, CWD, Gid, Mode, OFlags, Uid, chmod, chown, open},
    io::Errno,
};

use crate::place::{
    Case, GROUP, OWNER, Outcome, Place, STRANGER, changed, ensure, equal, mode, refused, run_as, set_owner, status,
    text, wait_for_the_next_tick,
};

pub(crate) const CASES: &[Case] = &[
    ("mode is set with all bits", mode_is_set_with_all_bits),
    ("umask applies to a new file and directory", umask_applies),
    ("only the owner changes the mode", only_the_owner_changes_the_mode),
    ("change of the mode follows a link", change_of_the_mode_follows_a_link),
    (
        "change of the mode updates the change time",
        change_of_the_mode_updates_the_change_time,
    ),
    (
        "set-group-id of a foreign group is cleared",
        set_group_id_of_a_foreign_group_is_cleared,
    ),
    ("only root changes the owner", only_root_changes_the_owner),
    (
        "owner gives a file to a group of its own",
        owner_gives_a_file_to_a_group_of_its_own,
    ),
    (
        "change of the owner clears set-id bits",
        change_of_the_owner_clears_set_id_bits,
    ),
    ("write clears set-id bits", write_clears_set_id_bits),
    ("truncation clears set-id bits", truncation_clears_set_id_bits),
    ("link itself has an owner", link_itself_has_an_owner),
    (
        "bits of owner, group and others apply",
        bits_of_owner_group_and_others_apply,
    ),
    (
        "directory without write permission refuses changes",
        directory_without_write_permission_refuses_changes,
    ),
    (
        "directory without search permission hides its files",
        directory_without_search_permission_hides_its_files,
    ),
    (
        "directory with set-group-id gives its group",
        directory_with_set_group_id_gives_its_group,
    ),
    (
        "sticky directory protects foreign files",
        sticky_directory_protects_foreign_files,
    ),
    (
        "access(2) agrees with the permissions",
        access_agrees_with_the_permissions,
    ),
    ("new file belongs to its creator", new_file_belongs_to_its_creator),
];

fn bits(mode: u32) -> Mode {
    Mode::from_raw_mode(mode)
}

fn mode_is_set_with_all_bits(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    for expected in [0, 0o1, 0o644, 0o4755, 0o2755, 0o1777, 0o7777] {
        text(chmod(&file, bits(expected)))?;
        equal(mode(&file)?, expected)?;
    }
    Ok(())
}

fn umask_applies(place: &Place) -> Outcome {
    text(open(place.at("file"), OFlags::CREATE | OFlags::WRONLY, bits(0o777)))?;
    text(rustix::fs::mkdir(place.at("directory"), bits(0o777)))?;
    equal(mode(&place.at("file"))?, 0o755)?;
    equal(mode(&place.at("directory"))?, 0o755)
}

fn only_the_owner_changes_the_mode(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o666)?;
    run_as(STRANGER, || refused(chmod(&file, bits(0o777)), Errno::PERM))?;
    run_as(OWNER, || text(chmod(&file, bits(0o600))))?;
    equal(mode(&file)?, 0o600)
}

fn change_of_the_mode_follows_a_link(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    text(symlink("file", place.at("link")))?;
    text(chmod(place.at("link"), bits(0o600)))?;
    equal(mode(&file)?, 0o600)?;
    text(symlink("nothing", place.at("dangling")))?;
    refused(chmod(place.at("dangling"), bits(0o600)), Errno::NOENT)
}

fn change_of_the_mode_updates_the_change_time(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    let before = changed(&file)?;
    wait_for_the_next_tick();
    text(chmod(&file, bits(0o600)))?;
    ensure(changed(&file)? > before, "the change time is the same")
}

fn set_group_id_of_a_foreign_group_is_cleared(place: &Place) -> Outcome {
    let foreign = place.file_of("foreign", OWNER, 3000, 0o755)?;
    let own = place.file_of("own", OWNER, GROUP, 0o755)?;
    run_as(OWNER, || {
        text(chmod(&foreign, bits(0o2755)))?;
        text(chmod(&own, bits(0o2755)))
    })?;
    equal((mode(&foreign)?, mode(&own)?), (0o755, 0o2755))
}

fn only_root_changes_the_owner(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o666)?;
    run_as(OWNER, || {
        refused(chown(&file, Some(Uid::from_raw(STRANGER)), None), Errno::PERM)
    })?;
    set_owner(&file, STRANGER, GROUP)?;
    let status = status(&file)?;
    equal((status.st_uid, status.st_gid), (STRANGER, GROUP))
}

fn owner_gives_a_file_to_a_group_of_its_own(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o644)?;
    run_as(OWNER, || {
        text(chown(&file, None, Some(Gid::from_raw(GROUP))))?;
        refused(chown(&file, None, Some(Gid::from_raw(3000))), Errno::PERM)
    })?;
    equal(status(&file)?.st_gid, GROUP)
}

fn change_of_the_owner_clears_set_id_bits(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o6755)?;
    run_as(OWNER, || text(chown(&file, None, Some(Gid::from_raw(GROUP)))))?;
    equal(mode(&file)?, 0o755)?;
    text(chmod(&file, bits(0o6755)))?;
    set_owner(&file, STRANGER, GROUP)?;
    equal(mode(&file)?, 0o755)
}

fn write_clears_set_id_bits(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o6777)?;
    run_as(STRANGER, || text(fs::write(&file, "text")))?;
    equal(mode(&file)?, 0o777)
}

fn truncation_clears_set_id_bits(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o6777)?;
    text(fs::write(&file, "text"))?;
    text(chmod(&file, bits(0o6777)))?;
    run_as(STRANGER, || {
        let opened = text(open(&file, OFlags::WRONLY, Mode::empty()))?;
        text(rustix::fs::ftruncate(opened, 1))
    })?;
    equal(mode(&file)?, 0o777)
}

fn link_itself_has_an_owner(place: &Place) -> Outcome {
    let file = place.file("file", "")?;
    text(symlink("file", place.at("link")))?;
    set_owner(&place.at("link"), OWNER, GROUP)?;
    equal((status(&place.at("link"))?.st_uid, status(&file)?.st_uid), (OWNER, 0))
}

fn bits_of_owner_group_and_others_apply(place: &Place) -> Outcome {
    let try_open =
        |user, path: &std::path::Path, flags| run_as(user, || Ok(open(path, flags, Mode::empty()).map(drop)));
    // The first that applies decides, also if a later one would allow more.
    let refuses_owner = place.file_of("owner", OWNER, GROUP, 0o077)?;
    refused(try_open(OWNER, &refuses_owner, OFlags::RDONLY)?, Errno::ACCESS)?;
    let refuses_group = place.file_of("group", 3000, GROUP, 0o707)?;
    refused(try_open(STRANGER, &refuses_group, OFlags::RDONLY)?, Errno::ACCESS)?;
    let allows_group = place.file_of("further-group", 3000, GROUP, 0o060)?;
    text(try_open(STRANGER, &allows_group, OFlags::RDWR)?)?;
    let read_only = place.file_of("others", 3000, 3000, 0o004)?;
    text(try_open(STRANGER, &read_only, OFlags::RDONLY)?)?;
    refused(try_open(STRANGER, &read_only, OFlags::WRONLY)?, Errno::ACCESS)?;
    refused(
        try_open(STRANGER, &read_only, OFlags::RDONLY | OFlags::TRUNC)?,
        Errno::ACCESS,
    )
}

fn directory_without_write_permission_refuses_changes(place: &Place) -> Outcome {
    let directory = place.directory_of("directory", 3000, 3000, 0o755)?;
    text(fs::write(directory.join("file"), ""))?;
    text(fs::create_dir(directory.join("empty")))?;
    let file = place.file_of("file", OWNER, OWNER, 0o666)?;
    run_as(OWNER, || {
        let inside = |name: &str| directory.join(name);
        let create = OFlags::CREATE | OFlags::WRONLY;
        refused(open(inside("new"), create, bits(0o644)), Errno::ACCESS)?;
        refused(rustix::fs::mkdir(inside("new"), bits(0o755)), Errno::ACCESS)?;
        refused(rustix::fs::symlink("x", inside("new")), Errno::ACCESS)?;
        refused(rustix::fs::link(&file, inside("new")), Errno::ACCESS)?;
        refused(rustix::fs::unlink(inside("file")), Errno::ACCESS)?;
        refused(rustix::fs::rmdir(inside("empty")), Errno::ACCESS)?;
        refused(rustix::fs::rename(inside("file"), place.at("moved")), Errno::ACCESS)?;
        refused(rustix::fs::rename(&file, inside("moved")), Errno::ACCESS)
    })
}

fn directory_without_search_permission_hides_its_files(place: &Place) -> Outcome {
    let directory = place.directory_of("directory", 3000, 3000, 0o644)?;
    text(fs::write(directory.join("file"), ""))?;
    run_as(OWNER, || {
        refused(rustix::fs::stat(directory.join("file")), Errno::ACCESS)?;
        refused(rustix::fs::stat(directory.join("missing")), Errno::ACCESS)?;
        let entries = text(fs::read_dir(&directory))?;
        equal(entries.count(), 1)
    })
}

fn directory_with_set_group_id_gives_its_group(place: &Place) -> Outcome {
    let directory = place.directory_of("directory", OWNER, GROUP, 0o2777)?;
    run_as(STRANGER, || {
        text(fs::write(directory.join("file"), ""))?;
        text(fs::create_dir(directory.join("below")))
    })?;
    equal(status(&directory.join("file"))?.st_gid, GROUP)?;
    equal(status(&directory.join("below"))?.st_gid, GROUP)?;
    equal(mode(&directory.join("below"))?, 0o2755)
}

fn sticky_directory_protects_foreign_files(place: &Place) -> Outcome {
    let directory = place.directory_of("directory", 0, 0, 0o1777)?;
    for name in ["first", "second"] {
        text(fs::write(directory.join(name), ""))?;
        set_owner(&directory.join(name), OWNER, OWNER)?;
    }
    let (first, second) = (directory.join("first"), directory.join("second"));
    run_as(STRANGER, || {
        refused(rustix::fs::unlink(&first), Errno::PERM)?;
        refused(rustix::fs::rename(&first, directory.join("moved")), Errno::PERM)?;
        text(fs::write(directory.join("own"), ""))?;
        refused(rustix::fs::rename(directory.join("own"), &second), Errno::PERM)
    })?;
    run_as(OWNER, || text(fs::remove_file(&first)))
}

fn access_agrees_with_the_permissions(place: &Place) -> Outcome {
    let file = place.file_of("file", OWNER, OWNER, 0o640)?;
    let access = |wanted| rustix::fs::accessat(CWD, &file, wanted, AtFlags::empty());
    text(access(Access::READ_OK | Access::WRITE_OK))?;
    refused(access(Access::EXEC_OK), Errno::ACCESS)?;
    run_as(OWNER, || text(access(Access::READ_OK | Access::WRITE_OK)))?;
    run_as(STRANGER, || {
        text(access(Access::EXISTS))?;
        refused(access(Access::READ_OK), Errno::ACCESS)
    })
}

fn new_file_belongs_to_its_creator(place: &Place) -> Outcome {
    run_as(OWNER, || {
        text(fs::write(place.at("file"), ""))?;
        text(fs::create_dir(place.at("directory")))?;
        text(symlink("x", place.at("link")))
    })?;
    for name in ["file", "directory", "link"] {
        let status = status(&place.at(name))?;
        equal((status.st_uid, status.st_gid), (OWNER, OWNER))?;
    }
    Ok(())
}
