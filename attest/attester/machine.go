package attester

import (
	"time"

	"sekisho/attest/gate"
)

// Facts are all that the state of attestation follows from.
type Facts struct {
	TPM         bool      // a TPM is open
	Enrolled    bool      // the state partition holds an enrolment
	Ticket      bool      // the state partition holds a ticket
	Refused     bool      // the last answer of a verifier was a refusal
	Unreachable bool      // the last attempt reached no verifier
	NotAfter    time.Time // end of the credential, zero if there is none
}

// Next derives the state, for gate.Status.State, from facts:
//
//	no TPM                      → no-tpm
//	credential in force         → affirming, until a refusal or its end
//	refused                     → refused
//	no verifier answers         → unreachable
//	enrolled                    → attesting
//	ticket                      → enrolling
//	neither                     → unenrolled
//
// A verifier that is away does not end a credential in force; a refusal does.
func Next(f Facts, now time.Time) string {
	switch {
	case !f.TPM:
		return gate.StateNoTPM
	case f.Refused:
		return gate.StateRefused
	case now.Before(f.NotAfter):
		return gate.StateAffirming
	case !f.Enrolled && !f.Ticket:
		return gate.StateUnenrolled
	case f.Unreachable:
		return gate.StateUnreachable
	case f.Enrolled:
		return gate.StateAttesting
	}
	return gate.StateEnrolling
}
