//! One formation, ever, whatever a peer says: a node among peers that answer what they like.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use futures::StreamExt as _;
use holdfast_proto::{
    peer::{
        AcceptRequest, AcceptResponse, ChangeMemberRequest, ChangeMemberResponse, Formation,
        HelloRequest, HelloResponse, JoinRequest, JoinResponse, Member, NodeState, ReportRequest,
        ReportResponse,
        membership_service_client::MembershipServiceClient,
        membership_service_server::{MembershipService, MembershipServiceServer},
    },
    v1::{StatusRequest, cluster_service_client::ClusterServiceClient},
};
use holdfast_tests::cluster::Cluster;
use parking_lot::Mutex;
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint, Server},
};
use tracing::info;

use crate::in_process;

/// Of a peer that is least, and of one that is not: a node draws its own between them.
const LEAST: u64 = 1;
const GREATEST: u64 = u64::MAX;
/// Of somebody whom nobody sees.
const UNSEEN: u64 = 2;

/// What a stranger says, and what it was asked.
#[derive(Debug, Default)]
struct Said {
    incarnation: u64,
    address: String,
    state: NodeState,
    cluster_id: String,
    formation: Option<Formation>,
    /// Beside itself; whoever says hello, if there are none.
    sees: Vec<u64>,
    accepts: bool,
    /// Who said hello.
    caller: Option<Member>,
    hellos: usize,
    proposals: Vec<Formation>,
    joins: usize,
}

/// A peer that says what a test makes it say.
struct Stranger {
    address: SocketAddr,
    said: Arc<Mutex<Said>>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

struct Speaks(Arc<Mutex<Said>>);

#[tonic::async_trait]
impl MembershipService for Speaks {
    async fn hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloResponse>, Status> {
        let caller = request.into_inner().self_.unwrap_or_default();
        let mut said = self.0.lock();
        said.hellos += 1;
        let others = if said.sees.is_empty() {
            vec![caller.incarnation]
        } else {
            said.sees.clone()
        };
        said.caller = Some(caller);
        Ok(Response::new(HelloResponse {
            self_: Some(said.member()),
            state: said.state.into(),
            cluster_id: said.cluster_id.clone(),
            expect: 2,
            sees: [others, vec![said.incarnation]].concat(),
            formation: said.formation.clone(),
            ..Default::default()
        }))
    }

    async fn accept(
        &self,
        request: Request<AcceptRequest>,
    ) -> Result<Response<AcceptResponse>, Status> {
        let mut said = self.0.lock();
        said.proposals.extend(request.into_inner().formation);
        Ok(Response::new(AcceptResponse {
            accepted: said.accepts,
            refusal: "not yet".into(),
        }))
    }

    async fn join(&self, _: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        self.0.lock().joins += 1;
        Ok(Response::new(JoinResponse::default()))
    }

    async fn change_member(
        &self,
        _: Request<ChangeMemberRequest>,
    ) -> Result<Response<ChangeMemberResponse>, Status> {
        Err(Status::unavailable("a stranger"))
    }

    async fn report(&self, _: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        Err(Status::unavailable("a stranger"))
    }
}

impl Said {
    fn member(&self) -> Member {
        Member {
            name: "stranger".into(),
            incarnation: self.incarnation,
            peer_address: self.address.clone(),
            ..Default::default()
        }
    }
}

impl Stranger {
    async fn start(incarnation: u64) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = NodeState::Empty;
        let said = Arc::new(Mutex::new(Said {
            incarnation,
            address: address.to_string(),
            state,
            ..Default::default()
        }));
        let server =
            Server::builder().add_service(MembershipServiceServer::new(Speaks(said.clone())));
        let accepted = tokio_stream::wrappers::TcpListenerStream::new(listener).boxed();
        Ok(Self {
            address,
            said,
            serving: tokio::spawn(server.serve_with_incoming(accepted)),
        })
    }

    fn says(&self, change: impl FnOnce(&mut Said)) {
        change(&mut self.said.lock());
    }

    fn proposals(&self) -> Vec<Formation> {
        self.said.lock().proposals.clone()
    }

    /// Until the node has met it so often again: each round of forming begins with it.
    async fn is_met(&self, cluster: &Cluster, times: usize) -> anyhow::Result<()> {
        let before = self.said.lock().hellos;
        cluster
            .until("the node looks around", async || {
                self.said.lock().hellos >= before + times
            })
            .await
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// One node that expects two, and a stranger in the other's place.
async fn beside(
    stranger: &Stranger,
) -> anyhow::Result<(Cluster, MembershipServiceClient<Channel>, Member)> {
    let setup = in_process()
        .nodes(1, 2)
        .extra("storage: {engine: memory}")
        .discover(vec![vec![stranger.address]]);
    let mut cluster = setup.configure()?;
    cluster.start_node(0).await?;
    stranger.is_met(&cluster, 1).await?;
    let node = stranger
        .said
        .lock()
        .caller
        .clone()
        .context("who said hello")?;
    let door =
        Endpoint::from_shared(format!("http://{}", cluster.addresses(0).peer))?.connect_lazy();
    Ok((cluster, MembershipServiceClient::new(door), node))
}

async fn says(cluster: &Cluster) -> String {
    cluster
        .admin(0, "/readyz")
        .await
        .map(|(_, body)| body)
        .unwrap_or_default()
}

async fn cluster_id(cluster: &Cluster) -> anyhow::Result<String> {
    Ok(ClusterServiceClient::new(cluster.channel(0))
        .status(StatusRequest {})
        .await?
        .into_inner()
        .cluster_id)
}

/// What a node answers to a proposal: nothing if it accepts.
async fn refusal(
    node: &mut MembershipServiceClient<Channel>,
    formation: &Formation,
    proposer: u64,
) -> anyhow::Result<String> {
    let answer = node
        .accept(AcceptRequest {
            formation: Some(formation.clone()),
            proposer,
        })
        .await?
        .into_inner();
    Ok(if answer.accepted {
        String::new()
    } else {
        answer.refusal
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proposal_that_not_all_have_accepted_forms_nothing_and_is_never_changed()
-> anyhow::Result<()> {
    let stranger = Stranger::start(GREATEST).await?;
    let (cluster, mut node, _) = beside(&stranger).await?;
    info!("--- the other one does not accept");
    cluster
        .until("it asks twice", async || stranger.proposals().len() >= 2)
        .await?;
    cluster
        .until("it says so", async || {
            says(&cluster)
                .await
                .contains("1 of 2 nodes have accepted to form the cluster")
        })
        .await?;
    stranger.is_met(&cluster, 3).await?;
    assert_eq!(
        cluster_id(&cluster).await?,
        "",
        "it formed a cluster of one"
    );

    info!("--- it accepts no other one");
    let mine = stranger.proposals()[0].clone();
    let theirs = Formation {
        cluster_id: "theirs".into(),
        ..mine.clone()
    };
    assert_eq!(
        refusal(&mut node, &theirs, mine.members[0].incarnation).await?,
        "this node has accepted another formation"
    );

    info!("--- nor does it join a cluster in its place");
    stranger.says(|said| (said.state, said.cluster_id) = (NodeState::Formed, "theirs".into()));
    stranger.is_met(&cluster, 4).await?;
    assert_eq!(
        stranger.said.lock().joins,
        0,
        "it wanted to join another cluster"
    );

    info!("--- the other one accepts");
    stranger.says(|said| {
        (said.state, said.cluster_id, said.accepts) = (NodeState::Empty, String::new(), true)
    });
    cluster
        .until("it is formed", async || {
            cluster_id(&cluster)
                .await
                .is_ok_and(|id| id == mine.cluster_id)
        })
        .await?;
    ensure!(
        stranger
            .proposals()
            .iter()
            .all(|proposal| *proposal == mine),
        "{:?}",
        stranger.proposals()
    );
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_least_proposes_nothing_and_accepts_only_what_it_sees() -> anyhow::Result<()> {
    let stranger = Stranger::start(LEAST).await?;
    let (cluster, mut node, me) = beside(&stranger).await?;
    stranger.is_met(&cluster, 4).await?;
    assert_eq!(stranger.proposals(), [], "it is not for it to propose");

    info!("--- what it does not accept");
    let other = stranger.said.lock().member();
    let of = |members: [&Member; 2]| {
        let members = members
            .into_iter()
            .zip(1..)
            .map(|(member, id)| Member {
                id,
                ..member.clone()
            })
            .collect();
        Formation {
            cluster_id: "formed".into(),
            members,
            shards: 1,
        }
    };
    let unseen = Member {
        incarnation: UNSEEN,
        ..other.clone()
    };
    assert_eq!(
        refusal(&mut node, &of([&unseen, &me]), UNSEEN).await?,
        "this node does not see all of these nodes"
    );
    let least = "this formation is not for the least incarnation to propose";
    assert_eq!(
        refusal(&mut node, &of([&other, &me]), me.incarnation).await?,
        least
    );
    let learner = Member {
        learner_only: true,
        ..other.clone()
    };
    assert_eq!(
        refusal(&mut node, &of([&learner, &me]), LEAST).await?,
        "a node with `node.role: learner` founds no cluster"
    );
    let sharded = Formation {
        shards: 7,
        ..of([&other, &me])
    };
    assert_eq!(
        refusal(&mut node, &sharded, LEAST).await?,
        "`cluster.shards` differs between the nodes"
    );
    assert_eq!(cluster_id(&cluster).await?, "");

    info!("--- what it accepts, again and again, and nothing else");
    let formation = of([&other, &me]);
    for _ in 0..2 {
        assert_eq!(refusal(&mut node, &formation, LEAST).await?, "");
        let another = Formation {
            cluster_id: "another".into(),
            ..formation.clone()
        };
        assert_eq!(
            refusal(&mut node, &another, LEAST).await?,
            "this node has accepted another formation"
        );
    }
    stranger
        .says(|said| (said.state, said.formation) = (NodeState::Accepted, Some(formation.clone())));
    cluster
        .until("it is formed", async || {
            cluster_id(&cluster).await.is_ok_and(|id| id == "formed")
        })
        .await?;
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_proposes_to_peers_that_see_others_or_have_accepted() -> anyhow::Result<()> {
    let stranger = Stranger::start(GREATEST).await?;
    stranger.says(|said| said.sees = vec![UNSEEN]);
    let (cluster, _, me) = beside(&stranger).await?;
    let disagree = "2 nodes are here, and do not all see each other";
    cluster
        .until("it says so", async || {
            says(&cluster).await.contains(disagree)
        })
        .await?;
    stranger.is_met(&cluster, 3).await?;
    assert_eq!(stranger.proposals(), [], "they do not see the same nodes");

    info!("--- it has accepted a formation of others");
    let member = |incarnation| Member {
        incarnation,
        ..Default::default()
    };
    let formation = Formation {
        cluster_id: "theirs".into(),
        members: vec![member(UNSEEN), member(GREATEST)],
        shards: 1,
    };
    stranger.says(|said| {
        (said.state, said.formation, said.sees) =
            (NodeState::Accepted, Some(formation), vec![me.incarnation])
    });
    let without = "others have accepted a formation without this node";
    cluster
        .until("it says so", async || {
            says(&cluster).await.contains(without)
        })
        .await?;
    stranger.is_met(&cluster, 3).await?;
    assert_eq!(
        stranger.proposals(),
        [],
        "it has accepted another formation"
    );
    assert_eq!(cluster_id(&cluster).await?, "");
    // A round of forming takes no longer than this, whatever its peers do.
    tokio::time::timeout(Duration::from_secs(10), cluster.stop()).await?
}
