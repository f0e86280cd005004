//! Which services a port has, and what reflection tells of them: clients see theirs, peers see
//! theirs.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use futures::stream;
use holdfast_proto::{
    peer::{
        self, membership_service_client::MembershipServiceClient,
        refresh_service_client::RefreshServiceClient, replica_service_client::ReplicaServiceClient,
    },
    v1::{
        self, cache_service_client::CacheServiceClient,
        cluster_service_client::ClusterServiceClient,
    },
};
use prost::Message as _;
use prost_types::FileDescriptorProto;
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};
use tonic_reflection::pb::{v1 as reflection, v1alpha};
use tracing::info;

use super::health;
use crate::in_process;

/// Names of the services that reflection lists.
async fn listed(channel: &Channel) -> anyhow::Result<BTreeSet<String>> {
    use reflection::{
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let request = reflection::ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    match reflected(channel, request).await? {
        MessageResponse::ListServicesResponse(list) => Ok(list
            .service
            .into_iter()
            .map(|service| service.name)
            .collect()),
        other => anyhow::bail!("a list of services was {other:?}"),
    }
}

async fn reflected(
    channel: &Channel,
    request: reflection::ServerReflectionRequest,
) -> anyhow::Result<reflection::server_reflection_response::MessageResponse> {
    let mut client =
        reflection::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut answers = client
        .server_reflection_info(stream::iter([request]))
        .await?
        .into_inner();
    answers
        .message()
        .await?
        .and_then(|answer| answer.message_response)
        .context("reflection answered nothing")
}

/// The files that describe something; nothing if it is not known.
async fn described(
    channel: &Channel,
    by: reflection::server_reflection_request::MessageRequest,
) -> anyhow::Result<Vec<FileDescriptorProto>> {
    use reflection::server_reflection_response::MessageResponse;
    let request = reflection::ServerReflectionRequest {
        message_request: Some(by),
        ..Default::default()
    };
    match reflected(channel, request).await {
        Ok(MessageResponse::FileDescriptorResponse(files)) => files
            .file_descriptor_proto
            .iter()
            .map(|file| Ok(FileDescriptorProto::decode(file.as_slice())?))
            .collect(),
        Ok(MessageResponse::ErrorResponse(error)) if error.error_code == Code::NotFound as i32 => {
            Ok(Vec::new())
        }
        Err(error)
            if error
                .downcast_ref::<Status>()
                .is_some_and(|status| status.code() == Code::NotFound) =>
        {
            Ok(Vec::new())
        }
        other => anyhow::bail!("a description was {other:?}"),
    }
}

fn unknown<T>(answer: Result<Response<T>, Status>) -> bool {
    answer.is_err_and(|status| status.code() == Code::Unimplemented)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_and_peers_each_see_their_own_services_only() -> anyhow::Result<()> {
    use reflection::server_reflection_request::MessageRequest;
    let cluster = in_process().nodes(1, 1).start().await?;
    let client = cluster.channel(0);
    let peer =
        Endpoint::from_shared(format!("http://{}", cluster.addresses(0).peer))?.connect_lazy();

    info!("--- what reflection tells a client");
    let public = [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "holdfast.v1.CacheService",
        "holdfast.v1.ClusterService",
    ];
    let services = listed(&client).await?;
    ensure!(
        services == public.map(str::to_owned).into(),
        "reflection lists {services:?}"
    );
    // Whatever a service names is described too, to the last import: what grpcurl needs to make a
    // call.
    let mut files: Vec<FileDescriptorProto> = Vec::new();
    for service in &services {
        let found = described(
            &client,
            MessageRequest::FileContainingSymbol(service.clone()),
        )
        .await?;
        ensure!(!found.is_empty(), "{service} is listed and not described");
        files.extend(found);
    }
    let mut seen = BTreeSet::new();
    while let Some(file) = files.pop() {
        ensure!(
            !file.package().starts_with("holdfast.peer"),
            "{} is shown to clients",
            file.name()
        );
        for import in file
            .dependency
            .into_iter()
            .filter(|import| seen.insert(import.clone()))
        {
            let found = described(&client, MessageRequest::FileByFilename(import.clone())).await?;
            ensure!(!found.is_empty(), "{import} is imported and not described");
            files.extend(found);
        }
    }
    for hidden in [
        "holdfast.peer.v1.ReplicaService",
        "holdfast.peer.v1.RefreshService.Fetch",
        "holdfast.peer.v1.Header",
    ] {
        ensure!(
            described(
                &client,
                MessageRequest::FileContainingSymbol(hidden.to_owned())
            )
            .await?
            .is_empty(),
            "{hidden} is described"
        );
    }
    ensure!(
        described(
            &client,
            MessageRequest::FileByFilename("holdfast/peer/v1/peer.proto".to_owned())
        )
        .await?
        .is_empty()
    );

    info!("--- to older tools too");
    let list = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1alpha::ServerReflectionRequest {
        message_request: Some(list),
        ..Default::default()
    };
    let mut older = v1alpha::server_reflection_client::ServerReflectionClient::new(client.clone());
    let answer = older
        .server_reflection_info(stream::iter([request]))
        .await?
        .into_inner()
        .message()
        .await?;
    let answer = format!("{:?}", answer.context("an answer")?);
    ensure!(
        answer.contains("holdfast.v1.CacheService") && !answer.contains("holdfast.peer"),
        "{answer}"
    );

    info!("--- what a client may not call");
    ensure!(unknown(
        ReplicaServiceClient::new(client.clone())
            .propose(peer::ProposeRequest::default())
            .await
    ));
    ensure!(unknown(
        MembershipServiceClient::new(client.clone())
            .hello(peer::HelloRequest::default())
            .await
    ));
    ensure!(unknown(
        RefreshServiceClient::new(client.clone())
            .fetch(tokio_stream::once(peer::FetchRequest::default()))
            .await
    ));

    info!("--- and a peer may not");
    ensure!(unknown(
        CacheServiceClient::new(peer.clone())
            .get(v1::GetRequest {
                key: "k".into(),
                ..Default::default()
            })
            .await
    ));
    ensure!(unknown(
        ClusterServiceClient::new(peer.clone())
            .status(v1::StatusRequest {})
            .await
    ));
    ensure!(
        health(&peer, "")
            .await
            .is_err_and(|status| status.code() == Code::Unimplemented)
    );
    ensure!(listed(&peer).await.is_err_and(|error| {
        error
            .downcast_ref::<Status>()
            .is_some_and(|status| status.code() == Code::Unimplemented)
    }));
    cluster.stop().await
}
