//! Tests of sources that several containers share.

use super::*;

#[test]
fn source_that_is_shared_twice_is_mounted_once_until_its_last_share_is_detached() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    let other = TempDir::new().unwrap();
    let (server, mut client) = start_server();

    let first = server.attach_in_pod(&share(directory.path(), "c1/0")).unwrap();
    let second = server.attach_in_pod(&share(directory.path(), "c2/0")).unwrap();
    let third = server.attach_in_pod(&share(other.path(), "c2/1")).unwrap();

    assert_eq!(
        (first.as_str(), second.as_str(), third.as_str()),
        (".shared/0", ".shared/0", ".shared/1")
    );
    let file = client.walk(".shared/0/file").unwrap().id;
    server.detach("c1").unwrap();
    assert_eq!(client.walk(".shared/0/file").unwrap().id, file);
    server.detach("c2").unwrap();
    for path in [".shared/0", ".shared/1"] {
        assert_eq!(client.walk(path).unwrap_err(), libc::ENOENT, "{path}");
    }
    assert_eq!(
        server.attach_in_pod(&share(directory.path(), "c1/0")).unwrap(),
        ".shared/2"
    );
}

#[test]
fn common_share_is_writable_once_one_of_its_shares_is() {
    let directory = TempDir::new().unwrap();
    let (server, mut client) = start_server();
    let read_only = |path| Share {
        read_only: ReadOnly::Top,
        recursive: true,
        ..share(directory.path(), path)
    };

    server.attach_in_pod(&read_only("c1/0")).unwrap();
    let root = client.walk(".shared/0").unwrap().id;
    assert_eq!(client.create(root, "x", 0o644).unwrap_err(), libc::EROFS);
    server.attach_in_pod(&share(directory.path(), "c2/0")).unwrap();
    client.create(root, "x", 0o644).unwrap();
    server.attach_in_pod(&read_only("c3/0")).unwrap();
    client.create(root, "y", 0o644).unwrap();
}

#[test]
fn sources_with_other_ids_or_other_mounts_have_their_own_common_shares() {
    enter_new_mount_namespace();
    let directory = TempDir::new().unwrap();
    mount_tmpfs(directory.path());
    let (below, clone) = (directory.path().join("below"), TempDir::new().unwrap());
    fs::create_dir(&below).unwrap();
    let none = None::<&str>;
    mount(Some(directory.path()), clone.path(), none, MsFlags::MS_BIND, none).unwrap();
    let (server, _client) = start_server();
    let recursive = |path| Share {
        recursive: true,
        ..share(directory.path(), path)
    };
    let mapped = Share {
        id_map: Some(crate::oci::ShareIdMap {
            map: ids(),
            recursive: false,
        }),
        ..share(directory.path(), "c/3")
    };

    let attach = |share: &Share| server.attach_in_pod(share).unwrap();
    assert_eq!(attach(&recursive("c/0")), ".shared/0");
    assert_eq!(attach(&recursive("c/1")), ".shared/0");
    assert_eq!(attach(&share(clone.path(), "c/2")), ".shared/1", "another mount");
    assert_eq!(attach(&mapped), ".shared/2", "other ids");
    mount_tmpfs(&below);
    assert_eq!(attach(&recursive("c/4")), ".shared/3", "a new mount of the host");
    assert_eq!(attach(&recursive("c/5")), ".shared/4", "each with mounts below it");
    assert_eq!(
        attach(&share(directory.path(), "c/6")),
        ".shared/0",
        "without what is mounted below"
    );
}
