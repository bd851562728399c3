//! Messages of Kubernetes' Container Runtime Interface, version 1.
//!
//! Belongs here: the messages and fields that the tests use, and which method takes which request. Names and numbers of
//! fields are those of the published `api.proto` (package `runtime.v1`). A field that no test sets or reads is left
//! out: protobuf skips it. Does not belong here: calls (`client`) and defaults (`pod`). Used by all of the crate.

mod common;
mod container;
mod node;
mod pod;
mod stats;
mod streams;

use prost::Message;

pub(crate) use self::{common::*, container::*, node::*, pod::*, stats::*, streams::*};

/// A request message, with its method and the type of its response.
pub(crate) trait Call: Message {
    /// `Service/Method`: the path of the HTTP request without the package name.
    const METHOD: &'static str;
    /// The message that the method returns.
    type Response: Message + Default;
}

macro_rules! calls {
    ($($method:literal: $request:ty => $response:ty;)*) => {
        $(impl Call for $request {
            const METHOD: &'static str = $method;
            type Response = $response;
        })*
    };
}

calls! {
    "RuntimeService/RunPodSandbox": RunPodSandboxRequest => RunPodSandboxResponse;
    "RuntimeService/StopPodSandbox": StopPodSandboxRequest => Empty;
    "RuntimeService/RemovePodSandbox": RemovePodSandboxRequest => Empty;
    "RuntimeService/PodSandboxStatus": PodSandboxStatusRequest => PodSandboxStatusResponse;
    "RuntimeService/ListPodSandbox": ListPodSandboxRequest => ListPodSandboxResponse;
    "RuntimeService/CreateContainer": CreateContainerRequest => CreateContainerResponse;
    "RuntimeService/StartContainer": StartContainerRequest => Empty;
    "RuntimeService/StopContainer": StopContainerRequest => Empty;
    "RuntimeService/RemoveContainer": RemoveContainerRequest => Empty;
    "RuntimeService/ListContainers": ListContainersRequest => ListContainersResponse;
    "RuntimeService/ContainerStatus": ContainerStatusRequest => ContainerStatusResponse;
    "RuntimeService/UpdateContainerResources": UpdateContainerResourcesRequest => Empty;
    "RuntimeService/ReopenContainerLog": ReopenContainerLogRequest => Empty;
    "RuntimeService/ExecSync": ExecSyncRequest => ExecSyncResponse;
    "RuntimeService/Exec": ExecRequest => StreamResponse;
    "RuntimeService/Attach": AttachRequest => StreamResponse;
    "RuntimeService/PortForward": PortForwardRequest => StreamResponse;
    "RuntimeService/ContainerStats": ContainerStatsRequest => ContainerStatsResponse;
    "RuntimeService/PodSandboxStats": PodSandboxStatsRequest => PodSandboxStatsResponse;
    "RuntimeService/ListContainerStats": ListContainerStatsRequest => ListContainerStatsResponse;
    "RuntimeService/ListPodSandboxStats": ListPodSandboxStatsRequest => ListPodSandboxStatsResponse;
    "RuntimeService/Status": StatusRequest => StatusResponse;
    "ImageService/ImageStatus": ImageStatusRequest => ImageStatusResponse;
}

/// A response without fields.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Empty {}
