//! Pods whose containers each have a disk.

use crate::{
    pod::{Handler, Pod},
    wait::wait_until,
};

/// Creates more containers in sequence than a machine has slots for disks, while one container keeps its disk. Then
/// uses all slots at once.
pub(crate) fn attach_and_detach(handler: Handler) {
    let pod = Pod::run(handler);
    let stays = pod.start("stays", &["sleep", "1000"]);
    let root = stays.sh("awk '$2 == \"/\" { print $1, $3 }' /proc/mounts");
    assert!(root.starts_with("/dev/vd") && root.ends_with(" ext4"), "{root}");
    let sum = stays.sh("dd if=/dev/urandom of=/data bs=1M count=8 2>/dev/null; sync; sha256sum </data");
    for number in 0..12 {
        let name = format!("goes-{number}");
        let container = pod.start(
            &name,
            &[
                "sh",
                "-c",
                "test ! -e /mine && echo mine >/mine && cat /mine && sleep 1000",
            ],
        );
        container.wait_for_line("mine");
        if number % 2 == 0 {
            container.stop(0);
        }
        container.remove();
    }
    assert_eq!(stays.sh("sha256sum </data"), sum);
    // As many containers as there are slots.
    let many: Vec<_> = (0..7)
        .map(|number| pod.start(&format!("beside-{number}"), &["sleep", "1000"]))
        .collect();
    let refused = pod
        .create("too-many", &["true"], |_| ())
        .and_then(|container| container.start());
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("at most 8"), "{refused}");
    many[3].remove();
    let last = pod.start("last", &["sleep", "1000"]);
    assert_eq!(last.sh("ls /mine 2>/dev/null; echo none"), "none");
    assert_eq!(stays.sh("sha256sum </data"), sum);
    wait_until("eight running containers", || {
        let running = pod
            .containers()
            .into_iter()
            .filter(|(_, state)| *state == crate::messages::ContainerState::Running);
        (running.count() == 8).then_some(())
    });
    pod.remove();
}
