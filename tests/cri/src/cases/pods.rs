//! Lives of pods and of the containers in them.

use crate::{
    messages::{ContainerState, PodState},
    pod::{Handler, Pod},
};

pub(crate) fn pod_of_one(handler: Handler) {
    let pod = Pod::run(handler);
    assert_eq!(pod.status().state(), PodState::Ready);
    let container = pod.start("one", &["sh", "-c", "echo hello; exit 42"]);
    let status = container.wait();
    assert_eq!(status.exit_code, 42);
    assert_eq!(status.reason, "Error");
    assert_eq!(container.output("stdout"), "hello\n");
    assert_eq!(pod.containers(), [("one".to_owned(), ContainerState::Exited)]);
    pod.remove();
}
