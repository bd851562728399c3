//! The Task service: translates containerd's messages to and from [`Tasks`]. The same methods serve versions 2 and 3
//! of the API, whose messages are identical.

use std::{collections::HashMap, future::Future, sync::Arc};

use async_trait::async_trait;
use containerd_shim::{
    protos::{
        api::{
            CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
            CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
            PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
            StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
            WaitRequest, WaitResponse,
        },
        protobuf::{EnumOrUnknown, MessageField, well_known_types::timestamp::Timestamp},
        shim::oci::ProcessDetails,
        shim_async::{Task, create_task},
        ttrpc::{
            self,
            asynchronous::{Service, TtrpcContext},
        },
    },
    util::convert_to_any,
};

use super::{completion::run_to_completion, connection::LastReply, metrics::encode_metrics};
use crate::control::monotonic_now;
use crate::oci::{ContainerId, HostMount};
use crate::shim::{
    error::{ErrorCode, TaskError},
    stdio,
    tasks::{CreateRequest, ExecRequest, Phase, Tasks},
};

/// The names of the service. containerd 1.7 uses only the second.
const TASK_SERVICES: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];

/// The Task service under each of its names.
pub(super) fn services(tasks: &Arc<Tasks>, last_reply: &LastReply) -> HashMap<String, Service> {
    let mut services = HashMap::new();
    for name in TASK_SERVICES {
        let service: Arc<dyn Task + Send + Sync> = Arc::new(TaskService {
            tasks: tasks.clone(),
            last_reply: last_reply.clone(),
        });
        services.extend(
            create_task(service)
                .into_values()
                .map(|service| (name.to_owned(), service)),
        );
    }
    services
}

struct TaskService {
    tasks: Arc<Tasks>,
    last_reply: LastReply,
}

impl TaskService {
    async fn run_to_completion<T, F>(&self, call: impl FnOnce(Arc<Tasks>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, TaskError>> + Send + 'static,
    {
        run_to_completion(&self.tasks, call).await
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let request = to_create_request(request)?;
        let pid = self
            .run_to_completion(|tasks| async move { tasks.create(request).await })
            .await?;
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let start = |tasks: Arc<Tasks>| async move { tasks.start(&request.id, &request.exec_id).await };
        Ok(StartResponse {
            pid: self.run_to_completion(start).await?,
            ..StartResponse::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let state = self.tasks.state(&request.id, &request.exec_id)?;
        let exit = state.phase.exit();
        Ok(StateResponse {
            id: request.id,
            bundle: state.container.bundle().display().to_string(),
            pid: state.pid,
            status: EnumOrUnknown::new(to_status(state.phase)),
            stdin: state.stdio_spec.stdin,
            stdout: state.stdio_spec.stdout,
            stderr: state.stdio_spec.stderr,
            terminal: state.stdio_spec.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| Timestamp::from(exit.at)).into(),
            exec_id: request.exec_id,
            ..StateResponse::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let delete = |tasks: Arc<Tasks>| async move { tasks.delete(&request.id, &request.exec_id).await };
        let deleted = self.run_to_completion(delete).await?;
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: MessageField::some(deleted.exit.at.into()),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let mut processes = Vec::new();
        for entry in self.tasks.pids(&request.id).await? {
            let mut process = ProcessInfo {
                pid: entry.pid,
                ..ProcessInfo::default()
            };
            if let Some(exec_id) = entry.exec {
                let details = ProcessDetails {
                    exec_id,
                    ..ProcessDetails::default()
                };
                let details = convert_to_any(Box::new(details)).map_err(|error| unknown_error(&error))?;
                process.info = MessageField::some(details);
            }
            processes.push(process);
        }
        Ok(PidsResponse {
            processes,
            ..PidsResponse::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.run_to_completion(|tasks| async move { tasks.pause(&request.id).await })
            .await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.run_to_completion(|tasks| async move { tasks.resume(&request.id).await })
            .await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let text = "checkpoints of a virtual machine are not supported";
        Err(TaskError::new(ErrorCode::Unimplemented, text).into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let KillRequest {
            id,
            exec_id,
            signal,
            all,
            ..
        } = request;
        self.run_to_completion(|tasks| async move { tasks.kill(&id, &exec_id, signal, all).await })
            .await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let exec = ExecRequest {
            exec: request.exec_id,
            spec: request.spec.unwrap_or_default().value,
            stdio: stdio::StdioSpec {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
        };
        self.tasks.exec(&request.id, exec).await?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let ResizePtyRequest {
            id,
            exec_id,
            width,
            height,
            ..
        } = request;
        self.run_to_completion(|tasks| async move { tasks.resize(&id, &exec_id, width, height).await })
            .await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.tasks.close_stdin(&request.id, &request.exec_id)?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = request.resources.unwrap_or_default().value;
        self.run_to_completion(|tasks| async move { tasks.update(&request.id, resources).await })
            .await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.tasks.wait(&request.id, &request.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.tasks.stats(&request.id).await?;
        Ok(StatsResponse {
            stats: MessageField::some(encode_metrics(&stats)),
            ..StatsResponse::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let (shim_pid, task_pid) = self.tasks.connect(&request.id);
        Ok(ConnectResponse {
            shim_pid,
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, context: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.last_reply.expect(&context.mh);
        self.tasks.shut_down(request.now);
        Ok(Empty::default())
    }
}

fn to_create_request(request: CreateTaskRequest) -> Result<CreateRequest, TaskError> {
    let invalid = |text: String| TaskError::new(ErrorCode::InvalidArgument, text);
    if !request.checkpoint.is_empty() {
        let text = "a container cannot be restored from a checkpoint into a virtual machine";
        return Err(TaskError::new(ErrorCode::Unimplemented, text));
    }
    let id: ContainerId = request
        .id
        .parse()
        .map_err(|error| invalid(format!("task id: {error}")))?;
    // A relative path is relative to the shim's working directory.
    let bundle = std::path::absolute(&request.bundle)
        .map_err(|error| invalid(format!("bundle {:?}: {error}", request.bundle)))?;
    Ok(CreateRequest {
        id,
        requested_at: monotonic_now(),
        bundle,
        rootfs: request
            .rootfs
            .into_iter()
            .map(|mount| HostMount {
                kind: mount.type_,
                source: mount.source,
                target: mount.target,
                options: mount.options,
            })
            .collect(),
        stdio: stdio::StdioSpec {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
    })
}

fn to_status(phase: Phase) -> Status {
    match phase {
        Phase::Creating | Phase::Created => Status::CREATED,
        Phase::Starting | Phase::Running => Status::RUNNING,
        Phase::Paused => Status::PAUSED,
        Phase::Stopped(_) | Phase::Deleting(_) | Phase::Deleted(_) => Status::STOPPED,
    }
}

fn unknown_error(error: &impl std::error::Error) -> ttrpc::Error {
    TaskError::unknown(error.to_string()).into()
}
