//! The Sandbox service (`containerd.runtime.sandbox.v1`): translates containerd's messages to and from [`Tasks`].
//! containerd uses it for runtimes with `sandboxer = "shim"` (containerd `api/runtime/sandbox/v1/sandbox.proto`).

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use containerd_shim::protos::{
    protobuf::{MessageField, well_known_types::timestamp::Timestamp},
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
        SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse,
        ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest,
        StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::{Sandbox, create_sandbox},
    ttrpc::{
        self,
        asynchronous::{Service, TtrpcContext},
    },
    types::platform,
};

use super::{completion::run_to_completion, connection::LastReply, metrics::encode_metrics};
use crate::control::monotonic_now;
use crate::oci::ContainerId;
use crate::shim::{
    error::{ErrorCode, TaskError},
    tasks::{SandboxRequest, Tasks},
};

/// The Sandbox service, keyed by its name.
pub(super) fn services(tasks: &Arc<Tasks>, last_reply: &LastReply) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService {
        tasks: tasks.clone(),
        last_reply: last_reply.clone(),
    }))
}

struct SandboxService {
    tasks: Arc<Tasks>,
    last_reply: LastReply,
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let request = to_sandbox_request(request)?;
        run_to_completion(&self.tasks, |tasks| async move { tasks.create_sandbox(request).await }).await?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let start = |tasks: Arc<Tasks>| async move { tasks.start_sandbox(&request.sandbox_id).await };
        let (pid, created_at) = run_to_completion(&self.tasks, start).await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: MessageField::some(created_at.into()),
            ..StartSandboxResponse::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        // The guest's platform, with Go's names for OS and architecture (OCI image spec, "Image Index", `platform`).
        let guest = platform::Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            ..platform::Platform::default()
        };
        Ok(PlatformResponse {
            platform: MessageField::some(guest),
            ..PlatformResponse::default()
        })
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> ttrpc::Result<StopSandboxResponse> {
        // 0 means that the request sets no limit.
        let limit = (request.timeout_secs > 0).then(|| Duration::from_secs(request.timeout_secs.into()));
        let stop = |tasks: Arc<Tasks>| async move { tasks.stop_sandbox(&request.sandbox_id, limit).await };
        run_to_completion(&self.tasks, stop).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.tasks.wait_sandbox(&request.sandbox_id).await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let status = self.tasks.sandbox_status(&request.sandbox_id, request.verbose)?;
        // The two states that containerd's CRI distinguishes (`core/sandbox`).
        let state = if status.ready {
            "SANDBOX_READY"
        } else {
            "SANDBOX_NOTREADY"
        };
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: status.pid,
            state: state.to_owned(),
            info: status.info,
            created_at: MessageField::some(status.created_at.into()),
            exited_at: status.exit.map(|exit| Timestamp::from(exit.at)).into(),
            ..SandboxStatusResponse::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.tasks.ping_sandbox(&request.sandbox_id)?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        context: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.last_reply.expect(&context.mh);
        let shut_down = |tasks: Arc<Tasks>| async move { tasks.shut_down_sandbox(&request.sandbox_id).await };
        run_to_completion(&self.tasks, shut_down).await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let stats = self.tasks.sandbox_metrics(&request.sandbox_id).await?;
        let mut response = SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.id = request.sandbox_id;
        metric.timestamp = MessageField::some(std::time::SystemTime::now().into());
        metric.data = MessageField::some(encode_metrics(&stats));
        Ok(response)
    }
}

fn to_sandbox_request(request: CreateSandboxRequest) -> Result<SandboxRequest, TaskError> {
    let invalid = |text: String| TaskError::new(ErrorCode::InvalidArgument, text);
    let id: ContainerId = request
        .sandbox_id
        .parse()
        .map_err(|error| invalid(format!("sandbox id: {error}")))?;
    // A relative path is relative to the shim's working directory.
    let bundle = std::path::absolute(&request.bundle_path)
        .map_err(|error| invalid(format!("bundle {:?}: {error}", request.bundle_path)))?;
    Ok(SandboxRequest {
        id,
        requested_at: monotonic_now(),
        bundle,
        options: request.options.into_option().map(|any| (any.type_url, any.value)),
        network: request.netns_path,
        annotations: request.annotations,
    })
}
