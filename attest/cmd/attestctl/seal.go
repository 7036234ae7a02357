package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/fleet"
	"sekisho/attest/seal"
)

// maxInput bounds every file that is read, in bytes.
const maxInput = 16 << 20

// sealOptions are the flags of permits, sealing and recovery.
type sealOptions struct {
	key, escrow, approvers, reason, replacement string
	epoch                                       uint64
}

func (o *sealOptions) flags(f *flag.FlagSet) {
	f.StringVar(&o.key, "key", "", "private key, P-256 in PEM: `file`")
	f.StringVar(&o.escrow, "escrow", "", "escrowed recovery key, `file`")
	f.StringVar(&o.approvers, "approvers", "", "PEM `file` with the public keys of the approvers")
	f.StringVar(&o.reason, "reason", "", "why, for the audit; source of a purchase list")
	f.StringVar(&o.replacement, "replacement", "", "device `id` that takes the device's place")
	f.Uint64Var(&o.epoch, "epoch", 0, "epoch of the release")
}

// sealCommands but one need no verifier: their keys are kept offline.
func sealCommands() map[string]command {
	return map[string]command{
		"approval sign":    {1, signApproval, show(printDocument[*approval.Signed])},
		"seal sign":        {1, sealSign, show(printRelease)},
		"seal show":        {1, sealShow, show(explainRelease)},
		"recovery escrow":  {1, lastEscrow, show(printDocument[*seal.Escrow])},
		"recovery request": {0, recoveryRequest, show(printDocument[*approval.Signed])},
		"recovery release": {1, recoveryRelease, show(printRecovery)},
		"recovery list":    {0, listRecoveries, show(printRecoveries)},
	}
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxInput+1))
	if err == nil && len(data) > maxInput {
		err = fmt.Errorf("%s: over %d bytes", name, maxInput)
	}
	return data, err
}

// privateKey reads the file of -key: PKCS #8 or SEC 1.
func (o *options) privateKey() (*ecdsa.PrivateKey, error) {
	if o.key == "" {
		return nil, fmt.Errorf("%w: -key is needed", errUsage)
	}
	data, err := readFile(o.key)
	if err != nil {
		return nil, err
	}
	b, _ := pem.Decode(data)
	if b == nil {
		return nil, fmt.Errorf("%s: no PEM", o.key)
	}
	if k, err := x509.ParseECPrivateKey(b.Bytes); err == nil {
		return k, nil
	}
	k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.key, err)
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: key of type %T, want ECDSA on P-256", o.key, k)
	}
	return ec, nil
}

func signApproval(_ context.Context, o *options, args []string) (any, error) {
	key, err := o.privateKey()
	if err != nil {
		return nil, err
	}
	data, err := readFile(args[0])
	if err != nil {
		return nil, err
	}
	s, err := approval.Parse(data)
	if err != nil {
		return nil, err
	}
	printer{os.Stderr, o.language}.say("署名対象 %s：%s", "signing %s: %s", s.Type, s.Payload)
	return s, s.Sign(key)
}

// lastEscrow gives the escrow of a device's newest disk, as recovery request
// and recovery release read it.
func lastEscrow(ctx context.Context, o *options, args []string) (any, error) {
	list, err := o.admin().Escrows(ctx, args[0])
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("device %s has no recovery key in escrow", args[0])
	}
	return &list[len(list)-1], nil
}

// printDocument prints the document itself, to be passed on.
func printDocument[T any](w printer, v T) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func sealSign(_ context.Context, o *options, args []string) (any, error) {
	key, err := o.privateKey()
	if err != nil {
		return nil, err
	}
	data, err := readFile(args[0])
	if err != nil {
		return nil, err
	}
	refs, err := attest.ParseReferenceValues(data)
	if err != nil {
		return nil, err
	}
	return seal.SignPolicy(key, refs, o.epoch)
}

func printRelease(w printer, r *seal.Release) error {
	data, err := r.Encode()
	if err != nil {
		return err
	}
	_, err = w.Write(data)
	return err
}

func sealShow(_ context.Context, _ *options, args []string) (any, error) {
	data, err := readFile(args[0])
	if err != nil {
		return nil, err
	}
	r, _, err := seal.ReadRelease(data)
	return r, err
}

func explainRelease(w printer, r *seal.Release) error {
	t, flush := w.table("", "")
	t.say("イメージ\t%s %s\nエポック\t%d\nリリース鍵\t%x", "image\t%s %s\nepoch\t%d\nrelease key\t%x", r.Image, r.Version, r.Epoch, sha256.Sum256(r.Key))
	for _, i := range seal.PCRs {
		fmt.Fprintf(t, "PCR %d\t%s\n", i, r.PCRs[i])
	}
	t.say("署名\tディスク、ログオン、ロールバックカウンターのすべてで有効", "signatures\tvalid for disk, logon, and the rollback counter")
	return flush()
}

func (o *options) readEscrow() (*seal.Escrow, error) {
	if o.escrow == "" {
		return nil, fmt.Errorf("%w: -escrow is needed", errUsage)
	}
	data, err := readFile(o.escrow)
	if err != nil {
		return nil, err
	}
	return seal.ParseEscrow(data)
}

func recoveryRequest(_ context.Context, o *options, _ []string) (any, error) {
	e, err := o.readEscrow()
	if err != nil {
		return nil, err
	}
	if o.reason == "" {
		return nil, fmt.Errorf("%w: -reason says why, for the audit", errUsage)
	}
	return approval.New(seal.ApproveRecovery, seal.RecoveryRequest{Device: e.Device, Volume: e.Volume, Reason: o.reason, Expires: o.until(time.Hour)})
}

// recovery is a released recovery key.
type recovery struct {
	Key     string        `json:"recovery_key"` // secret
	Device  attest.Digest `json:"device_id"`
	Signers []string      `json:"signers"`
}

// recoveryRelease shows the key only after the verifier has recorded the
// release: an approval is good for one.
func recoveryRelease(ctx context.Context, o *options, args []string) (any, error) {
	e, err := o.readEscrow()
	if err != nil {
		return nil, err
	}
	key, err := o.privateKey()
	if err != nil {
		return nil, err
	}
	if o.approvers == "" {
		return nil, fmt.Errorf("%w: -approvers is needed", errUsage)
	}
	list, err := readFile(o.approvers)
	if err != nil {
		return nil, err
	}
	approvers, err := approval.ParseApprovers(list, 2)
	if err != nil {
		return nil, err
	}
	data, err := readFile(args[0])
	if err != nil {
		return nil, err
	}
	signed, err := approval.Parse(data)
	if err != nil {
		return nil, err
	}
	r, who, err := e.Release(key, signed, approvers, time.Now())
	if errors.Is(err, approval.ErrNotApproved) {
		return nil, fmt.Errorf("%w; have another approver run: attestctl approval sign -key FILE %s", err, args[0])
	}
	if err != nil {
		return nil, err
	}
	if _, err := o.admin().UseRecovery(ctx, signed); err != nil {
		return nil, fmt.Errorf("the release could not be recorded, so the key is not shown: %w", err)
	}
	return recovery{r.Reveal(), e.Device, who}, nil
}

// printRecovery prints the key alone on standard output.
func printRecovery(w printer, r recovery) error {
	printer{os.Stderr, w.language}.say("端末 %s の回復キー（承認者 %v）。記録には残りません。", "recovery key of device %s, released by %v; it is not logged", r.Device, r.Signers)
	_, err := fmt.Fprintln(w, r.Key)
	return err
}

func listRecoveries(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Recoveries(ctx)
}

func printRecoveries(w printer, list []fleet.Recovery) error {
	t, flush := w.table("開示\t端末\tボリューム\t署名者数\t理由", "RELEASED\tDEVICE\tVOLUME\tSIGNERS\tREASON")
	for _, r := range list {
		t.row(t.when(r.Used), r.Device, fmt.Sprintf("%x", r.Volume), len(r.Signers), r.Reason)
	}
	return flush()
}
