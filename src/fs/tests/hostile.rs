//! Requests that the guest's kernel would not send.

use virtiofsd::fuse::Opcode;

use super::{
    client::{Client, ROOT},
    start_server,
};

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
