//! Overlays of a snapshotter as root file systems.

use super::*;

#[test]
fn overlay_is_shared_and_written_to_its_upper_directory() {
    let layers = Layers::new(2);
    let before = read_mountinfo();
    let (server, mut client) = start_server();
    let overlay = layers.overlay(2);
    server
        .attach_rootfs(
            &HostFiles::Mounts(vec![overlay]),
            &layers.path("rootfs"),
            "c/rootfs",
            false,
        )
        .unwrap();
    assert_eq!(read_mountinfo(), before, "the mounts appear in the shim's namespace");

    let root = client.walk("c/rootfs").unwrap().id;
    assert_eq!(client.list(root).unwrap(), ["file", "of-0", "of-1"]);
    let file = client.walk("c/rootfs/file").unwrap().id;
    let (handle, _) = client.open(file, libc::O_RDWR).unwrap();
    client.write(file, handle, b"upper", false).unwrap();
    client.unlink(root, "of-1").unwrap();
    client.as_user((5, 6)).mkdir(root, "made", 0o700).unwrap();

    assert_eq!(fs::read(layers.path("upper/file")).unwrap(), b"upper");
    assert_eq!(fs::read(layers.path("snapshots/0/fs/file")).unwrap(), b"lower");
    assert_eq!(fs::metadata(layers.path("upper/of-1")).unwrap().rdev(), 0, "whiteout");
    let made = fs::metadata(layers.path("upper/made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (5, 6));
}

#[test]
fn overlay_with_more_layers_than_a_page_holds_is_shared() {
    const LAYERS: usize = 200;
    let layers = Layers::new(LAYERS);
    let overlay = layers.overlay(LAYERS);
    assert!(overlay.options.join(",").len() > 4096);
    let (server, mut client) = start_server();
    server
        .attach_rootfs(
            &HostFiles::Mounts(vec![overlay]),
            &layers.path("rootfs"),
            "c/rootfs",
            false,
        )
        .unwrap();
    let root = client.walk("c/rootfs").unwrap().id;
    assert_eq!(client.list(root).unwrap().len(), LAYERS + 1);
    client.create(root, "new", 0o644).unwrap();
    assert!(layers.path("upper/new").exists());
}

#[test]
fn lower_layers_of_an_overlay_are_id_mapped() {
    let layers = Layers::new(2);
    rustix::fs::chown(layers.path("upper"), Some(Uid::from_raw(100_000)), None).unwrap();
    let mut overlay = layers.overlay(2);
    let map = ["uidmap=0:100000:65536", "gidmap=0:200000:65536"].map(str::to_owned);
    overlay.options.extend(map);
    let (server, mut client) = start_server();
    server
        .attach_rootfs(
            &HostFiles::Mounts(vec![overlay]),
            &layers.path("rootfs"),
            "c/rootfs",
            false,
        )
        .unwrap();

    let root = client.walk("c/rootfs").unwrap().id;
    assert_eq!(client.list(root).unwrap(), ["file", "of-0", "of-1"]);
    assert_eq!(owner(&mut client, "c/rootfs/of-1"), (100_000, 200_000));
    client.as_user((100_007, 200_008)).mkdir(root, "made", 0o700).unwrap();

    let made = fs::metadata(layers.path("upper/made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (100_007, 200_008));
    let file = client.walk("c/rootfs/file").unwrap().id;
    client.open(file, libc::O_RDWR).unwrap();
    let copied = fs::metadata(layers.path("upper/file")).unwrap();
    assert_eq!((copied.uid(), copied.gid()), (100_000, 200_000));
}
