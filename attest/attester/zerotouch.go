package attester

import (
	"errors"
	"fmt"

	"sekisho/attest"
)

// withoutTicket puts the outcome of an enrolment without a ticket into words.
// A verifier that has this TPM on its purchase list enrols it; where none
// does, or none answers, a ticket is what is missing.
func (a *Attester) withoutTicket(err error) error {
	var refusal *attest.Refusal
	var away *unreachable
	switch {
	case errors.As(err, &refusal) && refusal.Reason == attest.ReasonTicketUnknown, errors.As(err, &away):
		return &fault{attest.ReasonNoTicket, both(
			fmt.Sprintf("device %s is not enrolled and has no ticket; ask for one, or have it put on the purchase list", a.device),
			"端末が登録されておらず、登録チケットもありません。管理者にチケットを依頼してください。", err)}
	}
	return err
}
