"""How the members and trainers of a run agree on a round: messages, votes and verdicts (`swarm.rounds`)."""
