//! The service for an administrator: the actions `ps`, `inspect`, `metrics`, `console` and `shell` call it. The socket
//! accepts connections of the shim's own user only, which is root.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use containerd_shim::protos::ttrpc::{
    self, Code,
    asynchronous::{MethodHandler, Service, TtrpcContext},
    proto::{Request, Response},
};

use crate::shim::{
    error::{ErrorCode, TaskError},
    report::{ADMIN_SERVICE, CONSOLE, FULL_REPORT, REPORT, SHELL, ShimReport},
    tasks::Tasks,
};

/// The service by its name.
pub(super) fn services(tasks: &Arc<Tasks>) -> HashMap<String, Service> {
    let methods: [(&str, Box<dyn MethodHandler + Send + Sync>); 4] = [
        (REPORT, Box::new(Report(tasks.clone()))),
        (FULL_REPORT, Box::new(FullReport(tasks.clone()))),
        (CONSOLE, Box::new(Console(tasks.clone()))),
        (SHELL, Box::new(Shell(tasks.clone()))),
    ];
    let service = Service {
        methods: methods
            .into_iter()
            .map(|(name, method)| (name.to_owned(), method))
            .collect(),
        streams: HashMap::new(),
    };
    HashMap::from([(ADMIN_SERVICE.to_owned(), service)])
}

struct Report(Arc<Tasks>);

#[async_trait]
impl MethodHandler for Report {
    async fn handler(&self, _: TtrpcContext, _: Request) -> ttrpc::Result<Response> {
        Ok(encode(&self.0.report()))
    }
}

struct FullReport(Arc<Tasks>);

#[async_trait]
impl MethodHandler for FullReport {
    async fn handler(&self, _: TtrpcContext, _: Request) -> ttrpc::Result<Response> {
        Ok(encode(&self.0.full_report().await))
    }
}

struct Console(Arc<Tasks>);

#[async_trait]
impl MethodHandler for Console {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let id = String::from_utf8_lossy(&request.payload);
        Ok(match self.0.console(&id).await {
            Ok(console) => response(console.into_bytes()),
            Err(error) => failure(&error),
        })
    }
}

struct Shell(Arc<Tasks>);

#[async_trait]
impl MethodHandler for Shell {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let opened = match serde_json::from_slice(&request.payload) {
            Ok(request) => self.0.open_shell(request).await,
            Err(error) => Err(TaskError::new(
                ErrorCode::InvalidArgument,
                format!("cannot decode the request for a shell: {error}"),
            )),
        };
        Ok(match opened {
            Ok(()) => response(Vec::new()),
            Err(error) => failure(&error),
        })
    }
}

fn encode(report: &ShimReport) -> Response {
    match serde_json::to_vec(report) {
        Ok(report) => response(report),
        Err(error) => failure(&TaskError::unknown(format!("cannot encode the report: {error}"))),
    }
}

fn failure(error: &TaskError) -> Response {
    let mut response = Response::new();
    response.set_status(ttrpc::get_status(error.code().to_grpc(), error.to_string()));
    response
}

fn response(payload: Vec<u8>) -> Response {
    let mut response = Response::new();
    response.set_status(ttrpc::get_status(Code::OK, String::new()));
    response.payload = payload;
    response
}
