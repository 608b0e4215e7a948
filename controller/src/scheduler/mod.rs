//! Where domains go: pure functions from a picture of the cluster to a decision.
//!
//! No I/O, no clock, no randomness: the same [`ClusterView`] gives the same answer on every
//! member, and a test can own the world. Three questions are answered here:
//!
//! - [`place`]: which node takes a new domain, or a migrating one? Filter, then rank; every
//!   node that was passed over has a reason, which is kept with the decision.
//! - [`plan_drain`]: where does everything on a node go? Complete before anything moves: what
//!   cannot move says why, and what would help.
//! - [`plan_balance`]: which few moves would even out the measured load?
//!
//! Start with [`view`], the words of the question.

mod balance;
mod drain;
mod place;
#[cfg(test)]
mod tests;
mod view;

pub use balance::{BalanceMove, BalanceOptions, BalanceProposal, plan_balance};
pub(crate) use drain::listed;
pub use drain::{
    DrainOptions, DrainProposal, PARALLEL_MOVES_MAX, ProposedMove, RATE_FLOOR_BYTES_PER_SECOND,
    parallel_moves, plan_drain,
};
pub(crate) use place::shortage;
pub use place::{Decision, NoRoom, OTHER_NODE, PlaceOptions, Rejection, Strategy, place};
pub use view::{
    ClusterView, DomainView, LINK_BYTES_PER_SECOND, Mobility, NodeView, Origin, PoolNeeds,
    PoolView, Resources,
};
pub(crate) use view::{size, stays_behind, vcpus};
