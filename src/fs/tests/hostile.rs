//! Requests that the guest's kernel would not send.

use std::fs;

use tempfile::TempDir;
use virtiofsd::fuse::Opcode;

use super::{
    client::{Client, ROOT},
    start_server,
};
use crate::oci::{ReadOnly, Share};

#[test]
fn names_of_more_than_one_component_are_refused_cve_2026_47243() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    let client = &mut server.client;
    for name in ["..", ".", "", "a/b", "/etc", "../../c/0", "a/"] {
        for (what, result) in [
            ("lookup", client.lookup(parent, name).map(drop)),
            ("mkdir", client.mkdir(parent, name, 0o755).map(drop)),
            ("create", client.create(parent, name, 0o644).map(drop)),
            ("mknod", client.mknod(parent, name, libc::S_IFIFO | 0o644, 0).map(drop)),
            ("symlink", client.symlink(parent, name, "x").map(drop)),
            ("link", client.link(parent, parent, name).map(drop)),
            ("unlink", client.unlink(parent, name)),
            ("rename from", client.rename(parent, name, parent, "x")),
            ("rename to", client.rename(parent, "x", parent, name)),
        ] {
            assert_eq!(result.unwrap_err(), libc::EINVAL, "{what} {name:?}");
        }
    }
}

/// All of them are on one file system of the host. A link in a writable share would make a read-only file writable.
#[test]
fn files_cannot_be_linked_or_moved_from_one_share_to_another() {
    let mut server = start_server();
    let protected = TempDir::new().unwrap();
    fs::write(protected.path().join("file"), "protected").unwrap();
    let share = Share {
        source: protected.path().to_owned(),
        path: "c/1".to_owned(),
        read_only: ReadOnly::All,
        recursive: false,
        id_map: None,
    };
    server.process.attach(&share).unwrap();
    let client = &mut server.client;
    let [volume, root] = ["c/0", "c/rootfs"].map(|path| client.walk(path).unwrap().id);
    let read_only = client.walk("c/1").unwrap().id;
    client.create(volume, "file", 0o644).unwrap();
    for (from, to) in [(volume, root), (root, volume), (read_only, volume), (read_only, root)] {
        if from == root {
            client.create(root, "file", 0o644).unwrap();
        }
        let file = client.lookup(from, "file").unwrap().id;
        let expected = [libc::EXDEV, libc::EROFS];
        let linked = client.link(file, to, "linked").map(drop).unwrap_err();
        assert!(expected.contains(&linked), "{linked}");
        let renamed = client.rename(from, "file", to, "moved").unwrap_err();
        assert!(expected.contains(&renamed), "{renamed}");
    }
    assert_eq!(fs::read_to_string(protected.path().join("file")).unwrap(), "protected");
    for (folder, expected) in [(&server.directory, 1), (&server.rootfs, 1), (&protected, 1)] {
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), expected);
    }
}

/// What the guest has opened stays usable, as with a process of the host. It is no way to the files around it.
#[test]
fn directory_that_the_host_moves_out_of_a_share_leads_nowhere_else() {
    let mut server = start_server();
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    fs::create_dir(server.directory.path().join("moved")).unwrap();
    let moved = server.client.walk("c/0/moved").unwrap().id;

    fs::rename(server.directory.path().join("moved"), outside.path().join("moved")).unwrap();

    let client = &mut server.client;
    assert_eq!(client.lookup(moved, "..").unwrap_err(), libc::EINVAL);
    assert_eq!(client.lookup(moved, "secret").unwrap_err(), libc::ENOENT);
    assert_eq!(client.lookup(moved, "../secret").unwrap_err(), libc::EINVAL);
    assert_eq!(client.list(moved).unwrap(), [""; 0]);
    assert_eq!(client.walk("c/0/moved").unwrap_err(), libc::ENOENT);
    let volume = client.walk("c/0").unwrap().id;
    assert_eq!(client.list(volume).unwrap(), [""; 0]);
}

#[test]
fn malformed_requests_do_not_end_the_server() {
    let mut server = start_server();
    let client = &mut server.client;
    let garbage = [0xff; 64];
    for opcode in (0..64).chain([4096, u32::MAX]) {
        for body in [&[][..], &garbage[..1], &garbage[..8], &garbage] {
            let mut request = client.frame(opcode, ROOT, body);
            client.exchange(&request, 4096);
            client.exchange(&request, 15);
            client.exchange(&request, 0);
            for length in [0_u32, 39, 41, 1 << 20, u32::MAX] {
                request[..4].copy_from_slice(&length.to_le_bytes());
                client.exchange(&request, 4096);
            }
        }
    }
    for length in [0, 1, 39] {
        client.exchange(&[0; 39][..length], 4096);
    }
    // One of the FUSE_INIT requests above may have succeeded and changed the session. A valid one (FUSE 7.38) starts a
    // new session.
    let init = [7_u32, 38, 0, 1 << 27].map(u32::to_le_bytes).concat();
    let request = client.frame(Opcode::Init as u32, 0, &[&init[..], &[0; 48]].concat());
    client.exchange(&request, 4096);
    assert_eq!(client.walk("c/0").unwrap().attr.mode & libc::S_IFMT, libc::S_IFDIR);
}

/// The time that a process has run, in clock ticks: fields 14 and 15 of `stat` (proc(5)).
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit(')').next().unwrap().split_ascii_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

#[test]
fn broken_ring_does_not_occupy_a_cpu() {
    for break_ring in [Client::break_available_index, Client::send_head_beyond_the_table] {
        let mut server = start_server();
        break_ring(&mut server.client);
        let pid = server.process.child().id();
        let before = cpu_ticks(pid);
        // A loop would use 30 ticks of 10 ms.
        std::thread::sleep(std::time::Duration::from_millis(300));
        let used = cpu_ticks(pid) - before;
        assert!(used < 10, "{used} ticks");
    }
}

/// Each execution uses the same buffers, and no state of the server depends on a head.
#[test]
fn head_that_is_available_several_times_is_as_many_requests_cve_2026_45782() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    let client = &mut server.client;
    let (file, handle) = client.create(parent, "file", 0o644).unwrap();
    // The second one is executed by several threads at a time.
    for (opcode, body) in [
        (Opcode::Getattr, vec![0; 16]),
        (Opcode::Fsync, handle.to_le_bytes().to_vec()),
    ] {
        let request = client.frame(opcode as u32, file.id, &[body, vec![0; 8]].concat());
        client.exchange(&request, 4096);

        client.repeat_head(8);

        assert_eq!(client.attr(file.id).unwrap().size, 0, "{opcode:?}");
    }
}

#[test]
fn unknown_node_ids_and_handles_are_errors() {
    let mut server = start_server();
    let (node, handle) = {
        let parent = server.client.walk("c/0").unwrap().id;
        let (file, handle) = server.client.create(parent, "file", 0o644).unwrap();
        (file.id, handle)
    };
    let client = &mut server.client;
    for unknown in [0, node + 1, 1 << 62, 1 << 63, u64::MAX] {
        assert_eq!(client.attr(unknown).unwrap_err(), libc::EBADF, "{unknown:#x}");
        assert_eq!(client.lookup(unknown, "x").unwrap_err(), libc::EBADF, "{unknown:#x}");
        assert_eq!(
            client.read(node, handle.wrapping_add(unknown | 1), 1).unwrap_err(),
            libc::EBADF
        );
        client.forget(unknown, u64::MAX);
    }
    assert_eq!(
        client.read(ROOT, handle, 1).unwrap_err(),
        libc::EBADF,
        "another file's handle"
    );
}

#[test]
fn offsets_beyond_the_largest_file_are_errors() {
    let mut server = start_server();
    let parent = server.client.walk("c/0").unwrap().id;
    let client = &mut server.client;
    let (file, handle) = client.create(parent, "file", 0o644).unwrap();
    for opcode in [Opcode::Read, Opcode::Write] {
        for offset in [1 << 63, u64::MAX] {
            let body = [[handle, offset, 1, 0, 0].map(u64::to_le_bytes).as_flattened(), b"x"].concat();
            let request = client.frame(opcode as u32, file.id, &body);
            let reply = client.exchange(&request, 4096);
            assert_eq!(reply[4..8], (-libc::EINVAL).to_le_bytes(), "{opcode:?} at {offset:#x}");
        }
    }
    assert_eq!(client.attr(file.id).unwrap().size, 0);
}

#[test]
fn top_of_the_tree_is_read_only() {
    let mut server = start_server();
    let client = &mut server.client;
    let container = client.walk("c").unwrap().id;
    for parent in [ROOT, container] {
        assert_eq!(client.mkdir(parent, "x", 0o755).unwrap_err(), libc::EROFS);
        assert_eq!(client.create(parent, "x", 0o644).unwrap_err(), libc::EROFS);
        assert_eq!(client.set_mode(parent, libc::S_IFDIR | 0o777).unwrap_err(), libc::EROFS);
    }
    assert!(client.rename(container, "0", container, "x").is_err());
    assert_eq!(client.list(ROOT).unwrap(), ["c"]);
}
