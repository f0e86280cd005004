//! What commands mean that say who belongs to the cluster: the roster of shard 0.

use holdfast_proto::{
    peer::{Admitted, LogId, Member, Outcome, RemovedMember, RosterRecord, outcome},
    reason,
};

use super::{
    error::ApplyError,
    run::{Run, rejected},
};

/// Removed members that the roster remembers by their incarnation.
const REMOVED_MAX: usize = 256;

impl Run<'_> {
    /// Ids come from a counter and are never used again. The same incarnation asking twice gets the
    /// same id.
    pub(super) fn admit_member(
        &mut self,
        log_id: LogId,
        member: Option<&Member>,
    ) -> Result<Outcome, ApplyError> {
        let member = member.ok_or(ApplyError::UnknownCommand {
            index: log_id.index,
        })?;
        let mut roster = self.roster();
        roster.version += 1;
        let same = |known: &&mut Member| known.incarnation == member.incarnation;
        if let Some(known) = roster.members.iter_mut().find(same) {
            let id = known.id;
            *known = Member {
                id,
                ..member.clone()
            };
            self.roster = Some(roster);
            return Ok(outcome::Result::Admitted(Admitted { id }).into());
        }
        let was_removed = |gone: &RemovedMember| gone.incarnation == member.incarnation;
        if member.id != 0 || roster.removed.iter().any(was_removed) {
            let message = format!(
                "`{}` was removed: to let it join again as a new member, remove its data directory first",
                member.name
            );
            return Ok(rejected(reason::MEMBERSHIP, &message));
        }
        // Nothing of it survived its restart: who comes under its name takes its place.
        let is_replaced =
            |known: &&Member| known.name == member.name && known.volatile && member.volatile;
        if let Some(replaced) = roster.members.iter().find(is_replaced) {
            let id = replaced.id;
            forget(&mut roster, id);
        }
        let taken = |known: &&Member| {
            known.name == member.name || known.peer_address == member.peer_address
        };
        if let Some(known) = roster.members.iter().find(taken) {
            let message = format!(
                "a member `{}` at {} exists with another incarnation: run `holdfast member remove {}` if it is gone for good",
                known.name, known.peer_address, known.name
            );
            return Ok(rejected(reason::MEMBERSHIP, &message));
        }
        let id = roster.next_id;
        roster.next_id += 1;
        roster.members.push(Member {
            id,
            ..member.clone()
        });
        self.roster = Some(roster);
        Ok(outcome::Result::Admitted(Admitted { id }).into())
    }

    pub(super) fn promote_member(&mut self, id: u64) -> Result<Outcome, ApplyError> {
        let mut roster = self.roster();
        if !roster.members.iter().any(|member| member.id == id) {
            return Ok(rejected(
                reason::NO_MEMBER,
                &format!("there is no member with id {id}"),
            ));
        }
        if !roster.voters.contains(&id) {
            roster.voters.push(id);
            roster.version += 1;
        }
        self.roster = Some(roster);
        Ok(self.unchanged())
    }

    pub(super) fn forget_member(&mut self, id: u64) -> Result<Outcome, ApplyError> {
        let mut roster = self.roster();
        roster.version += 1;
        forget(&mut roster, id);
        self.roster = Some(roster);
        Ok(self.unchanged())
    }
}

/// The member is gone for good: its id is never used again, and its data directory never welcome.
fn forget(roster: &mut RosterRecord, id: u64) {
    let Some(at) = roster.members.iter().position(|member| member.id == id) else {
        return;
    };
    let gone = roster.members.remove(at);
    roster.voters.retain(|&voter| voter != id);
    roster.removed.push(RemovedMember {
        id,
        incarnation: gone.incarnation,
        name: gone.name,
    });
    let too_many = roster.removed.len().saturating_sub(REMOVED_MAX);
    roster.removed.drain(..too_many);
}
