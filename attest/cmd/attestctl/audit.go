package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/note"

	"sekisho/attest"
	"sekisho/attest/archive"
	"sekisho/attest/auditlog"
	"sekisho/attest/fleet"
	"sekisho/attest/policy"
	"sekisho/attest/report"
)

const auditUsage = `usage: attestctl audit key [-socket PATH]
       attestctl audit copy DIR -key FILE [-reports] [-socket PATH]
       attestctl audit proof REPORT [-log DIR|URL -key FILE] [-socket PATH]
       attestctl audit verify COPY -key FILE [-since CHECKPOINT] [-report-key FILE] [REPORT|DIR ...]
       attestctl audit verify PROOF -key FILE [-report-key FILE] [REPORT]

the verifier's log of all reports, which cannot be changed unseen

  key     print the public key of the log; keep it where the verifier cannot
          change it, it is what everything below is judged by
  copy    bring a copy of the log in DIR up to date; with -reports also of the
          reports that the verifier still has, in DIR/reports
  proof   print the proof that a report (its id or file) is in the log, as a
          C2SP tlog-proof; -log asks a copy or a mirror of the log instead
  verify  judge a copy, in a directory or below a URL, without the verifier:
          its checkpoint is signed, its leaves are exactly those that were
          signed, it has grown out of the log of the CHECKPOINT that you kept
          from last time, and each REPORT, or each in DIR, is in it. With
          -report-key (attestctl report key) each report is also re-verified:
          signed, and the appraisal gives the same verdict again.
          "checkpoint" in COPY is the file to keep for next time

exit status: 0 all is as it was signed (of reports: whatever their verdict), 1
it is not, 2 it could not be found out

flags
`

// maxReports bounds the reports of one audit.
const maxReports = 1 << 20

// auditOptions are the flags of audit.
type auditOptions struct {
	socket, key, log, since, reportKey, language string
	json, reports                                bool
}

// audits runs the command if it is about the log of reports.
func audits(args []string, stdout, stderr io.Writer) (exit int, ok bool) {
	if len(args) == 0 || args[0] != "audit" {
		return 0, false
	}
	var o auditOptions
	f := flag.NewFlagSet("attestctl audit", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.socket, "socket", defaultSocket, "verifier's admin socket")
	f.StringVar(&o.key, "key", "", "public key of the log, a `file`")
	f.StringVar(&o.log, "log", "", "copy of the log, a `directory` or URL")
	f.StringVar(&o.since, "since", "", "earlier checkpoint, a `file`")
	f.StringVar(&o.reportKey, "report-key", "", "verifier's public key for reports, PEM `file`")
	f.BoolVar(&o.reports, "reports", false, "copy the reports too")
	f.StringVar(&o.language, "lang", "", "`language`: ja or en (default: the locale's)")
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.Usage = func() {
		fmt.Fprint(stderr, auditUsage)
		f.PrintDefaults()
	}
	words, err := parse(f, args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitPass, true
	case err != nil:
		return exitNone, true
	}
	if o.language, err = language(o.language); err == nil {
		exit, err = o.run(context.Background(), words, stdout)
	}
	var bad *auditlog.Tampered
	switch {
	case errors.Is(err, errUsage):
		f.Usage()
		return exitNone, true
	case err == nil:
		return exit, true
	}
	fmt.Fprintln(stderr, "attestctl:", err)
	if errors.As(err, &bad) || errors.Is(err, auditlog.ErrNotInLog) {
		return exitRefuse, true
	}
	return exitNone, true
}

func (o *auditOptions) run(ctx context.Context, words []string, w io.Writer) (int, error) {
	if len(words) == 0 {
		return exitNone, errUsage
	}
	admin := fleet.NewAdmin(o.socket)
	command, words := words[0], words[1:]
	switch {
	case command == "key" && len(words) == 0:
		k, err := admin.AuditKey(ctx)
		if err != nil {
			return exitNone, err
		}
		return exitPass, o.print(w, k, k.Key+"\n")
	case command == "proof" && len(words) == 1:
		return o.proof(ctx, admin, words[0], w)
	case command == "copy" && len(words) == 1 && o.key != "":
		return o.copy(ctx, admin, words[0], w)
	case command == "verify" && len(words) > 0 && o.key != "":
		return o.verify(ctx, words[0], words[1:], w)
	}
	return exitNone, errUsage
}

func (o *auditOptions) print(w io.Writer, v any, text string) error {
	if o.json {
		return writeJSON(w, v)
	}
	_, err := io.WriteString(w, text)
	return err
}

func (o *auditOptions) publicKey() (note.Verifier, error) {
	data, err := readAtMost(o.key, 4<<10)
	if err != nil {
		return nil, err
	}
	// "audit key -json" is a key too.
	var k fleet.AuditKey
	if json.Unmarshal(data, &k) == nil && k.Key != "" {
		data = []byte(k.Key)
	}
	return auditlog.ParsePublicKey(data)
}

// source is a copy of a log, in a directory or below a URL.
func source(name string) (auditlog.Source, error) {
	if strings.Contains(name, "://") {
		return auditlog.NewMirror(name)
	}
	return auditlog.Dir(name), nil
}

func (o *auditOptions) proof(ctx context.Context, admin *fleet.Admin, name string, w io.Writer) (int, error) {
	id, err := archive.ParseID(name)
	if err != nil { // a file
		f, err := readReport(name)
		if err != nil {
			return exitNone, err
		}
		id = f.id
	}
	var p auditlog.Proof
	if o.log == "" {
		p, err = admin.AuditProof(ctx, hex.EncodeToString(id[:]))
	} else {
		var from auditlog.Source
		var key note.Verifier
		if o.key == "" {
			return exitNone, errUsage
		}
		if from, err = source(o.log); err != nil {
			return exitNone, err
		}
		if key, err = o.publicKey(); err != nil {
			return exitNone, err
		}
		p, err = auditlog.ProofIn(ctx, from, key, id)
	}
	if err != nil {
		return exitNone, err
	}
	text, err := p.MarshalText()
	if err != nil {
		return exitNone, err
	}
	return exitPass, o.print(w, p, string(text))
}

// copied is what audit copy has done.
type copied struct {
	Leaves  uint64 `json:"leaves"`
	Reports int    `json:"reports"` // fetched now
	Gone    int    `json:"gone"`    // no longer with the verifier
}

func (o *auditOptions) copy(ctx context.Context, admin *fleet.Admin, dir string, w io.Writer) (int, error) {
	key, err := o.publicKey()
	if err != nil {
		return exitNone, err
	}
	var c copied
	if c.Leaves, err = auditlog.Copy(ctx, fleet.AuditLog{Admin: admin}, key, dir); err != nil {
		return exitNone, err
	}
	if o.reports {
		to := filepath.Join(dir, "reports")
		if err := os.MkdirAll(to, 0o700); err != nil {
			return exitNone, err
		}
		if _, err := auditlog.Check(ctx, auditlog.Dir(dir), key, nil, func(_ uint64, l auditlog.Leaf) error {
			id := hex.EncodeToString(l.Report[:])
			file := filepath.Join(to, id+".cose")
			if _, err := os.Stat(file); err == nil {
				return nil
			}
			f, err := admin.Report(ctx, id)
			if errors.Is(err, fs.ErrNotExist) {
				c.Gone++
				return nil
			}
			if err != nil {
				return err
			}
			c.Reports++
			return os.WriteFile(file, f.Data, 0o600)
		}); err != nil {
			return exitNone, err
		}
	}
	text := attest.Say("葉 %d 個、報告書 %d 通を取得（%d 通は既に削除済み）\n", "%d leaves; %d reports fetched, %d are no longer kept\n", c.Leaves, c.Reports, c.Gone).In(o.language)
	return exitPass, o.print(w, c, text)
}

// namedReport is a report as the log names it.
type namedReport struct {
	name   string
	id     archive.ID
	digest attest.Digest
}

// readReport reads a report for its name and digest; nothing else is judged.
func readReport(name string) (f namedReport, err error) {
	data, err := readAtMost(name, report.MaxReport)
	if err != nil {
		return f, err
	}
	r, _, err := report.Parse(data, nil)
	if err != nil {
		return f, &auditlog.Tampered{Why: fmt.Sprintf("%s: %v", name, err)}
	}
	f = namedReport{name: name, digest: sha256.Sum256(data)}
	f.id, err = archive.ParseID(report.ID(r.Evidence.Value))
	return f, err
}

// files are the names, and those in the directories among them.
func files(names []string) (list []string, err error) {
	for _, name := range names {
		info, err := os.Stat(name)
		if err != nil {
			return nil, err
		}
		if !info.IsDir() {
			list = append(list, name)
			continue
		}
		inside, err := os.ReadDir(name)
		if err != nil {
			return nil, err
		}
		for _, e := range inside {
			if e.Type().IsRegular() {
				list = append(list, filepath.Join(name, e.Name()))
			}
		}
	}
	if len(list) > maxReports {
		return nil, fmt.Errorf("%d reports, at most %d at once", len(list), maxReports)
	}
	return list, nil
}

// audited is what audit verify has found.
type audited struct {
	*auditlog.State
	Since      bool     `json:"since"`      // it has grown out of the earlier checkpoint
	Reports    int      `json:"reports"`    // that were looked for
	Reverified bool     `json:"reverified"` // and appraised again
	Affirming  int      `json:"affirming"`  // of these
	Wrong      []string `json:"wrong"`      // empty: all is as it was signed
}

func (o *auditOptions) verify(ctx context.Context, name string, reports []string, w io.Writer) (int, error) {
	key, err := o.publicKey()
	if err != nil {
		return exitNone, err
	}
	var reportKey *ecdsa.PublicKey
	if o.reportKey != "" {
		pem, err := readAtMost(o.reportKey, 16<<10)
		if err != nil {
			return exitNone, err
		}
		if reportKey, err = policy.ParseKey(pem); err != nil {
			return exitNone, fmt.Errorf("%s: %w", o.reportKey, err)
		}
	}
	names, err := files(reports)
	if err != nil {
		return exitNone, err
	}
	a := audited{Reports: len(names), Reverified: reportKey != nil, Wrong: []string{}}
	wrong := func(name, format string, args ...any) {
		a.Wrong = append(a.Wrong, name+": "+fmt.Sprintf(format, args...))
	}
	want := make(map[archive.ID]namedReport, len(names))
	for _, name := range names {
		f, err := readReport(name)
		var bad *auditlog.Tampered
		if errors.As(err, &bad) {
			a.Wrong = append(a.Wrong, bad.Why)
			continue
		}
		if err != nil {
			return exitNone, err
		}
		if other, ok := want[f.id]; ok && other.digest != f.digest {
			wrong(name, "has the id of %s and other bytes", other.name)
		}
		want[f.id] = f
		if reportKey != nil {
			data, err := readAtMost(name, report.MaxReport)
			if err != nil {
				return exitNone, err
			}
			v, err := report.Verify(data, report.Trust{Key: reportKey})
			switch {
			case v == nil || err != nil:
				wrong(name, "%v", err)
			case !v.Same:
				wrong(name, "the appraisal gives another verdict: %s", v.Different)
			case v.Appraisal.Status == attest.StatusAffirming:
				a.Affirming++
			}
		}
	}
	look := func(_ uint64, l auditlog.Leaf) error {
		if f, ok := want[l.Report]; ok {
			if f.digest != l.Digest {
				wrong(f.name, "SHA-256 %s, in the log %s", f.digest, l.Digest)
			}
			delete(want, l.Report)
		}
		return nil
	}
	if err := o.judge(ctx, name, key, look, &a); err != nil {
		return exitNone, err
	}
	for _, f := range want {
		wrong(f.name, "is not in the log")
	}
	exit := exitPass
	if len(a.Wrong) > 0 {
		exit = exitRefuse
	}
	if o.json {
		return exit, writeJSON(w, a)
	}
	o.say(printer{w, o.language}, a)
	return exit, nil
}

// judge checks a copy or a proof.
func (o *auditOptions) judge(ctx context.Context, name string, key note.Verifier, look func(uint64, auditlog.Leaf) error, a *audited) error {
	var since []byte
	var err error
	if o.since != "" {
		if since, err = readAtMost(o.since, 64<<10); err != nil {
			return err
		}
	}
	if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
		data, err := readAtMost(name, 64<<10)
		if err != nil {
			return err
		}
		p, err := auditlog.ParseProof(data)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if since != nil {
			return fmt.Errorf("%w: -since needs the log, not a proof", errUsage)
		}
		leaf, err := p.Verify(key)
		if err != nil {
			return &auditlog.Tampered{Why: fmt.Sprintf("%s: %v", name, err)}
		}
		c, err := auditlog.ParseCheckpoint([]byte(p.Checkpoint), key)
		if err != nil {
			return err
		}
		a.State = &auditlog.State{Origin: c.Origin, Size: c.Size, Root: c.Hash, Text: p.Checkpoint}
		return look(p.Index, leaf)
	}
	from, err := source(name)
	if err != nil {
		return err
	}
	a.Since = since != nil
	a.State, err = auditlog.Check(ctx, from, key, since, look)
	return err
}

func (o *auditOptions) say(p printer, a audited) {
	p.say("記録簿     %s\n葉         %d 個、チェックポイントの署名は検証済み", "log        %s\nleaves     %d, under a checkpoint that the log's key has signed", a.Origin, a.Size)
	if a.Since {
		p.say("以前       前回のチェックポイントからの追記のみ", "since      nothing of the earlier checkpoint was changed or removed")
	}
	p.say("報告書     %d 通", "reports    %d", a.Reports)
	if a.Reverified {
		p.say("再判定     済み、うち承認 %d 通", "appraised  again, %d of them affirming", a.Affirming)
	} else if a.Reports > 0 {
		p.say("再判定     していません（-report-key）", "appraised  not again: give -report-key")
	}
	for _, w := range a.Wrong {
		p.say("異常       %s", "WRONG      %s", w)
	}
}
