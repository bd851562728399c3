//! Task calls: each service name with the same messages, called by name.

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

use crate::PATIENCE;

/// Version 2 of the Task service, the one that containerd 1.7 knows.
pub const V2: &str = "containerd.task.v2.Task";
/// Version 3.
pub const V3: &str = "containerd.task.v3.Task";

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The code that the shim answered; `None` if it did not answer.
    pub code: Option<Code>,
    /// The text.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}: {}", self.code, self.message)
    }
}

impl From<ttrpc::Error> for Failure {
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

/// What a call comes to.
pub type Answer<T> = Result<T, Failure>;

/// A connection to a shim.
#[derive(Clone)]
pub struct Task {
    client: Client,
    service: &'static str,
    limit: Duration,
}

impl fmt::Debug for Task {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.service)
    }
}

impl Task {
    /// Connects to `address`, for calls of `service`.
    pub fn connect(address: &str, service: &'static str) -> Self {
        Self {
            client: Client::connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}")),
            service,
            limit: PATIENCE,
        }
    }

    /// The same connection, for calls of another service.
    pub fn of(&self, service: &'static str) -> Self {
        Self {
            service,
            ..self.clone()
        }
    }

    /// The same connection, for calls that must be answered within `limit`.
    pub fn within(&self, limit: Duration) -> Self {
        Self { limit, ..self.clone() }
    }

    /// Calls any method.
    ///
    /// # Errors
    ///
    /// The shim's [`Failure`], or that it did not answer.
    pub fn call<R: Message>(&self, method: &str, request: &impl Message) -> Answer<R> {
        let request = Request {
            service: self.service.to_owned(),
            method: method.to_owned(),
            timeout_nano: i64::try_from(self.limit.as_nanos()).unwrap(),
            payload: request.write_to_bytes().unwrap(),
            ..Request::default()
        };
        let response = self.client.request(request)?;
        Ok(R::parse_from_bytes(&response.payload).unwrap())
    }

    /// Create; the pid.
    ///
    /// # Errors
    ///
    /// As [`Self::call`]; so for all of the following.
    pub fn create(&self, request: &CreateTaskRequest) -> Answer<u32> {
        self.call("Create", request)
            .map(|response: CreateTaskResponse| response.pid)
    }

    /// Start of a container, or of its exec; the pid.
    pub fn start(&self, id: &str, exec: &str) -> Answer<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..StartRequest::default()
        };
        self.call("Start", &request).map(|response: StartResponse| response.pid)
    }

    /// State.
    pub fn state(&self, id: &str, exec: &str) -> Answer<StateResponse> {
        let request = StateRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..StateRequest::default()
        };
        self.call("State", &request)
    }

    /// Delete.
    pub fn delete(&self, id: &str, exec: &str) -> Answer<DeleteResponse> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..DeleteRequest::default()
        };
        self.call("Delete", &request)
    }

    /// Pids.
    pub fn pids(&self, id: &str) -> Answer<PidsResponse> {
        let request = PidsRequest {
            id: id.to_owned(),
            ..PidsRequest::default()
        };
        self.call("Pids", &request)
    }

    /// Pause.
    pub fn pause(&self, id: &str) -> Answer<Empty> {
        let request = PauseRequest {
            id: id.to_owned(),
            ..PauseRequest::default()
        };
        self.call("Pause", &request)
    }

    /// Resume.
    pub fn resume(&self, id: &str) -> Answer<Empty> {
        let request = ResumeRequest {
            id: id.to_owned(),
            ..ResumeRequest::default()
        };
        self.call("Resume", &request)
    }

    /// Kill of one process.
    pub fn kill(&self, id: &str, exec: &str, signal: u32) -> Answer<Empty> {
        self.kill_all(id, exec, signal, false)
    }

    /// Kill, of all processes of the container if `all`.
    pub fn kill_all(&self, id: &str, exec: &str, signal: u32, all: bool) -> Answer<Empty> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..KillRequest::default()
        };
        self.call("Kill", &request)
    }

    /// Exec: adds a process.
    pub fn exec(&self, request: &ExecProcessRequest) -> Answer<Empty> {
        self.call("Exec", request)
    }

    /// ResizePty.
    pub fn resize(&self, id: &str, exec: &str, width: u32, height: u32) -> Answer<Empty> {
        let request = ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        self.call("ResizePty", &request)
    }

    /// CloseIO of standard input.
    pub fn close_stdin(&self, id: &str, exec: &str) -> Answer<Empty> {
        let request = CloseIORequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.call("CloseIO", &request)
    }

    /// Update.
    pub fn update(&self, id: &str, resources: &Value) -> Answer<Empty> {
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(json_any("LinuxResources", resources)).into(),
            ..UpdateTaskRequest::default()
        };
        self.call("Update", &request)
    }

    /// Wait.
    pub fn wait(&self, id: &str, exec: &str) -> Answer<WaitResponse> {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..WaitRequest::default()
        };
        self.call("Wait", &request)
    }

    /// Stats, decoded.
    pub fn stats(&self, id: &str) -> Answer<Metrics> {
        let request = StatsRequest {
            id: id.to_owned(),
            ..StatsRequest::default()
        };
        let stats = self.call::<StatsResponse>("Stats", &request)?.stats;
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        Ok(Metrics::parse_from_bytes(&stats.value).unwrap())
    }

    /// Connect.
    pub fn connect_to(&self, id: &str) -> Answer<ConnectResponse> {
        let request = ConnectRequest {
            id: id.to_owned(),
            ..ConnectRequest::default()
        };
        self.call("Connect", &request)
    }

    /// Shutdown.
    pub fn shutdown(&self, id: &str, now: bool) -> Answer<Empty> {
        let request = ShutdownRequest {
            id: id.to_owned(),
            now,
            ..ShutdownRequest::default()
        };
        self.call("Shutdown", &request)
    }
}

/// JSON of a type of the OCI spec, as containerd's typeurl wraps it.
pub fn json_any(name: &str, value: &Value) -> Any {
    Any {
        type_url: format!("types.containerd.io/opencontainers/runtime-spec/1/{name}"),
        value: value.to_string().into_bytes(),
        ..Any::default()
    }
}
