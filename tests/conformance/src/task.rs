//! A client of the Task service. The services of a shim share one connection, and versions 2 and 3 of the Task service
//! have the same messages.

use std::{fmt, time::Duration};

use containerd_shim_protos::{
    api::{
        CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
        DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
        ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
        StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    cgroups_v2::metrics::Metrics,
    protobuf::{Message, well_known_types::any::Any},
    ttrpc::{self, Client, Code, proto::Request},
};
use serde_json::Value;

use crate::TIMEOUT;

/// Version 2 of the Task service, the only one that containerd 1.7 supports.
pub const V2: &str = "containerd.task.v2.Task";
/// Version 3 of the Task service.
pub const V3: &str = "containerd.task.v3.Task";

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallError {
    /// The code in the shim's response; `None` if there was no response.
    pub code: Option<Code>,
    /// The text of the error.
    pub message: String,
}

impl fmt::Display for CallError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}: {}", self.code, self.message)
    }
}

impl From<ttrpc::Error> for CallError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self {
                code: Some(status.code()),
                message: status.message,
            },
            error => Self {
                code: None,
                message: error.to_string(),
            },
        }
    }
}

/// A response, or the gRPC code and text of an error.
pub type CallResult<T> = Result<T, CallError>;

/// A connection to a shim, for calls of one service.
#[derive(Clone)]
pub struct TaskClient {
    client: Client,
    service: &'static str,
    timeout: Duration,
}

impl fmt::Debug for TaskClient {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.service)
    }
}

impl TaskClient {
    /// Connects to `address` (`unix://PATH`), for calls of `service`.
    pub fn connect(address: &str, service: &'static str) -> Self {
        Self {
            client: Client::connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}")),
            service,
            timeout: TIMEOUT,
        }
    }

    /// The same connection, for calls of another service.
    pub fn with_service(&self, service: &'static str) -> Self {
        Self {
            service,
            ..self.clone()
        }
    }

    /// The same connection, with another timeout for calls.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self {
            timeout,
            ..self.clone()
        }
    }

    /// Calls a method by its name.
    ///
    /// # Errors
    ///
    /// The shim responded with an error, or did not respond within the timeout.
    pub fn call<R: Message>(&self, method: &str, request: &impl Message) -> CallResult<R> {
        let request = Request {
            service: self.service.to_owned(),
            method: method.to_owned(),
            timeout_nano: i64::try_from(self.timeout.as_nanos()).unwrap(),
            payload: request.write_to_bytes().unwrap(),
            ..Request::default()
        };
        let response = self.client.request(request)?;
        Ok(R::parse_from_bytes(&response.payload).unwrap())
    }

    /// Create: returns the pid.
    ///
    /// # Errors
    ///
    /// The errors of [`Self::call`]. All methods below have the same errors.
    pub fn create(&self, request: &CreateTaskRequest) -> CallResult<u32> {
        self.call("Create", request)
            .map(|response: CreateTaskResponse| response.pid)
    }

    /// Start of a container, or of its exec if `exec` is not empty: returns the pid.
    pub fn start(&self, id: &str, exec: &str) -> CallResult<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..StartRequest::default()
        };
        self.call("Start", &request).map(|response: StartResponse| response.pid)
    }

    /// Calls State of the Task service.
    pub fn state(&self, id: &str, exec: &str) -> CallResult<StateResponse> {
        let request = StateRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..StateRequest::default()
        };
        self.call("State", &request)
    }

    /// Calls Delete of the Task service.
    pub fn delete(&self, id: &str, exec: &str) -> CallResult<DeleteResponse> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..DeleteRequest::default()
        };
        self.call("Delete", &request)
    }

    /// Calls Pids of the Task service.
    pub fn pids(&self, id: &str) -> CallResult<PidsResponse> {
        let request = PidsRequest {
            id: id.to_owned(),
            ..PidsRequest::default()
        };
        self.call("Pids", &request)
    }

    /// Calls Pause of the Task service.
    pub fn pause(&self, id: &str) -> CallResult<Empty> {
        let request = PauseRequest {
            id: id.to_owned(),
            ..PauseRequest::default()
        };
        self.call("Pause", &request)
    }

    /// Calls Resume of the Task service.
    pub fn resume(&self, id: &str) -> CallResult<Empty> {
        let request = ResumeRequest {
            id: id.to_owned(),
            ..ResumeRequest::default()
        };
        self.call("Resume", &request)
    }

    /// Kill of the container's process, or of an exec.
    pub fn kill(&self, id: &str, exec: &str, signal: u32) -> CallResult<Empty> {
        self.kill_all(id, exec, signal, false)
    }

    /// Kill with the field `all`: of every process of the container.
    pub fn kill_all(&self, id: &str, exec: &str, signal: u32, all: bool) -> CallResult<Empty> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..KillRequest::default()
        };
        self.call("Kill", &request)
    }

    /// Exec: adds a process, which Start runs.
    pub fn exec(&self, request: &ExecProcessRequest) -> CallResult<Empty> {
        self.call("Exec", request)
    }

    /// ResizePty.
    pub fn resize(&self, id: &str, exec: &str, width: u32, height: u32) -> CallResult<Empty> {
        let request = ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        self.call("ResizePty", &request)
    }

    /// CloseIO for standard input.
    pub fn close_stdin(&self, id: &str, exec: &str) -> CallResult<Empty> {
        let request = CloseIORequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.call("CloseIO", &request)
    }

    /// Update with resources of the OCI spec.
    pub fn update(&self, id: &str, resources: &Value) -> CallResult<Empty> {
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(json_any("LinuxResources", resources)).into(),
            ..UpdateTaskRequest::default()
        };
        self.call("Update", &request)
    }

    /// Calls Wait of the Task service.
    pub fn wait(&self, id: &str, exec: &str) -> CallResult<WaitResponse> {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..WaitRequest::default()
        };
        self.call("Wait", &request)
    }

    /// Stats, decoded as metrics of cgroup v2.
    pub fn stats(&self, id: &str) -> CallResult<Metrics> {
        let request = StatsRequest {
            id: id.to_owned(),
            ..StatsRequest::default()
        };
        let stats = self.call::<StatsResponse>("Stats", &request)?.stats;
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        Ok(Metrics::parse_from_bytes(&stats.value).unwrap())
    }

    /// Connect: returns the pids of shim and container.
    pub fn connect_to(&self, id: &str) -> CallResult<ConnectResponse> {
        let request = ConnectRequest {
            id: id.to_owned(),
            ..ConnectRequest::default()
        };
        self.call("Connect", &request)
    }

    /// Shutdown; with `now` also while there are containers.
    pub fn shutdown(&self, id: &str, now: bool) -> CallResult<Empty> {
        let request = ShutdownRequest {
            id: id.to_owned(),
            now,
            ..ShutdownRequest::default()
        };
        self.call("Shutdown", &request)
    }
}

/// Wraps a JSON value of the OCI spec's type `name`, as containerd's typeurl does.
pub fn json_any(name: &str, value: &Value) -> Any {
    Any {
        type_url: format!("types.containerd.io/opencontainers/runtime-spec/1/{name}"),
        value: value.to_string().into_bytes(),
        ..Any::default()
    }
}
