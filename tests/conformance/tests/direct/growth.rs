//! A shim that has served a hundred lives holds what it held after ten.

use std::sync::Arc;

use containerd_shim_protos::{api::Status, types::mount::Mount};
use nutshell_conformance::{
    Containerd,
    bundle::{Bundle, idle, spec},
    container::{Container, SIGKILL},
    containerd::Shim,
    host::{self, Usage},
    with_containerd,
};
use serde_json::Value;

/// What may differ by chance: buffers that the allocator keeps, in KiB.
const TOLERANCE: u64 = 128;

fn assert_no_growth(tenth: Usage, hundredth: Usage) {
    assert_eq!(
        (hundredth.descriptors, hundredth.threads),
        (tenth.descriptors, tenth.threads),
        "descriptors and threads"
    );
    assert!(
        hundredth.private <= tenth.private + TOLERANCE,
        "memory grew from {} to {} KiB",
        tenth.private,
        hundredth.private
    );
    println!("after 10: {tenth:?}, after 100: {hundredth:?}");
}

/// A pod: its sandbox runs, members can be created.
fn sandbox(containerd: &Containerd) -> Container<'_> {
    let id = containerd.new_name("sandbox");
    let bundle = containerd.bundle_of(&id, &in_pod(&idle(), &id, "sandbox"));
    let shim = containerd.shim(&bundle);
    let mut prepared = containerd.prepare_in(bundle, shim);
    prepared.request.stdout = String::new();
    prepared.request.stderr = String::new();
    let sandbox = prepared.create().unwrap();
    sandbox.start();
    sandbox
}

fn in_pod(spec: &Value, sandbox: &str, kind: &str) -> Value {
    let mut spec = spec.clone();
    spec["annotations"]["io.kubernetes.cri.container-type"] = kind.into();
    spec["annotations"]["io.kubernetes.cri.sandbox-id"] = sandbox.into();
    spec
}

fn member<'c>(containerd: &'c Containerd, shim: &Shim, sandbox: &str, spec: &Value) -> Container<'c> {
    let bundle: Arc<Bundle> = containerd.bundle(&in_pod(spec, sandbox, "container"));
    let mut prepared = containerd.prepare_in(bundle, shim.clone());
    let root: Vec<Mount> = std::mem::take(&mut prepared.request.rootfs);
    prepared.request.rootfs = root;
    let container = prepared.create().unwrap();
    container.start();
    container
}

fn live(containerd: &Containerd, shim: &Shim, sandbox: &str) {
    let container = member(containerd, shim, sandbox, &spec(&["sh", "-c", "echo out; exit 7"]));
    assert_eq!(container.wait(), 7);
    assert_eq!(container.stdout.all(), "out\n");
    container.remove();
    containerd.delete_answer(&container.bundle);
    container.bundle.remove();
}

#[test]
fn hundred_containers_one_after_the_other_leave_nothing_in_the_shim() {
    with_containerd(|containerd| {
        let sandbox = sandbox(containerd);
        let mut tenth = None;
        for number in 1..=100 {
            live(containerd, &sandbox.shim, &sandbox.id);
            if number == 10 {
                tenth = Some(host::usage(sandbox.shim.pid));
            }
        }
        assert_no_growth(tenth.unwrap(), host::usage(sandbox.shim.pid));
        sandbox.end();
    });
}

#[test]
fn thirty_containers_at_once_live_and_leave_nothing_in_the_shim() {
    with_containerd(|containerd| {
        let sandbox = sandbox(containerd);
        let all_at_once = || {
            std::thread::scope(|scope| {
                for _ in 0..30 {
                    scope.spawn(|| live(containerd, &sandbox.shim, &sandbox.id));
                }
            });
        };
        all_at_once();
        let first = host::usage(sandbox.shim.pid);
        all_at_once();
        assert_no_growth(first, host::usage(sandbox.shim.pid));
        assert_eq!(sandbox.status(""), Status::RUNNING);
        sandbox.end();
    });
}

#[test]
fn hundred_execs_leave_nothing_in_the_shim() {
    with_containerd(|containerd| {
        let container = containerd.run(&idle());
        let mut tenth = None;
        for number in 1..=100 {
            assert_eq!(container.output_of("echo out"), "out\n");
            if number == 10 {
                tenth = Some(host::usage(container.shim.pid));
            }
        }
        assert_no_growth(tenth.unwrap(), host::usage(container.shim.pid));
        container.kill(SIGKILL);
        container.end();
    });
}
