//! Which cluster a state belongs to, in the state itself: a directory that was mixed up with another
//! cluster's is found before it answers anything. It travels with snapshots, all of one cluster.

use std::io;

use holdfast_proto::peer::ClusterRecord;

use super::record;
use crate::store::{Family, StateBatch, StateStore};

/// Makes the state that cluster's, durably. Refused if it is another's already.
pub(crate) fn claim(store: &dyn StateStore, cluster_id: &str) -> io::Result<()> {
    if let Some(bytes) = store.get(Family::System, record::CLUSTER)? {
        return check(bytes, cluster_id);
    }
    let owner = ClusterRecord {
        cluster_id: cluster_id.to_owned(),
        ..Default::default()
    };
    let mut batch = StateBatch::default();
    batch.put(Family::System, record::CLUSTER, record::encode(&owner));
    store.write(batch)?;
    store.flush()
}

/// Whether a record of the key `CLUSTER` names this cluster.
pub(crate) fn check(bytes: bytes::Bytes, cluster_id: &str) -> io::Result<()> {
    let owner: ClusterRecord = record::decode("cluster", &bytes)?;
    if owner.cluster_id == cluster_id {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!(
            "the state belongs to cluster {}, this is cluster {cluster_id}: is it the right data directory?",
            owner.cluster_id
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;

    #[test]
    fn a_state_belongs_to_one_cluster() {
        let stores = Stores::memory();
        let state = stores.open_state(0).expect("a state");
        claim(state.as_ref(), "a").expect("nobody's");
        drop(state);
        let state = stores.open_state(0).expect("a state");
        claim(state.as_ref(), "a").expect("its own");
        let refused = claim(state.as_ref(), "b").expect_err("another's");
        assert!(
            refused.to_string().contains("belongs to cluster a"),
            "{refused}"
        );
    }
}
