BEGIN TRANSACTION;
CREATE TABLE annotators (
	id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	role VARCHAR DEFAULT 'annotator' NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name, kind), 
	CHECK (role in ('annotator', 'researcher')), 
	CHECK (kind in ('person', 'model', 'simulated'))
);
INSERT INTO "annotators" VALUES(1,'ann','person','annotator');
CREATE TABLE "database" (
	id VARCHAR NOT NULL, 
	version INTEGER NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "database" VALUES('de9760640f064f99aa0357c61ad044ec',4);
CREATE TABLE forms (
	sha VARCHAR NOT NULL, 
	form VARCHAR NOT NULL, 
	PRIMARY KEY (sha)
);
CREATE TABLE guidelines (
	sha VARCHAR NOT NULL, 
	text VARCHAR NOT NULL, 
	PRIMARY KEY (sha)
);
CREATE TABLE invitations (
	annotator_id INTEGER NOT NULL, 
	sha VARCHAR NOT NULL, 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (annotator_id), 
	FOREIGN KEY(annotator_id) REFERENCES annotators (id), 
	UNIQUE (sha)
);
CREATE TABLE judgements (
	id INTEGER NOT NULL, 
	slot_id INTEGER NOT NULL, 
	lease INTEGER NOT NULL, 
	annotator_id INTEGER NOT NULL, 
	rev INTEGER, 
	token VARCHAR NOT NULL, 
	preference INTEGER, 
	answers JSON, 
	form VARCHAR, 
	both_bad BOOLEAN DEFAULT 0 NOT NULL, 
	reason VARCHAR, 
	guidelines VARCHAR, 
	client_ms INTEGER, 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (slot_id, rev), 
	FOREIGN KEY(slot_id, lease, annotator_id) REFERENCES views (slot_id, lease, annotator_id), 
	CHECK (preference between -3 and 3), 
	CHECK (NOT both_bad OR (preference IS NOT NULL AND preference = 0)), 
	CHECK (rev >= 0), 
	UNIQUE (token), 
	FOREIGN KEY(form) REFERENCES forms (sha), 
	FOREIGN KEY(guidelines) REFERENCES guidelines (sha)
);
INSERT INTO "judgements" VALUES(1,1,1,1,0,'1-1-0',2,NULL,NULL,0,NULL,NULL,NULL,1.79529626285431981088e+09);
INSERT INTO "judgements" VALUES(2,1,1,1,1,'1-1-1',-3,NULL,NULL,0,NULL,NULL,NULL,1.79529626285685062411e+09);
INSERT INTO "judgements" VALUES(3,2,1,1,0,'2-1-0',NULL,NULL,NULL,0,NULL,NULL,NULL,1.79529626285787796973e+09);
CREATE TABLE prompts (
	id VARCHAR NOT NULL, 
	messages JSON NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "prompts" VALUES('4226e4b83c6ff595','[{"role": "user", "content": "question 0"}]');
INSERT INTO "prompts" VALUES('9be7ee290d8456cb','[{"role": "user", "content": "question 1"}]');
INSERT INTO "prompts" VALUES('b45844fbfbd72eb3','[{"role": "user", "content": "question 2"}]');
CREATE TABLE responses (
	id INTEGER NOT NULL, 
	prompt_id VARCHAR NOT NULL, 
	sha VARCHAR NOT NULL, 
	text VARCHAR NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (prompt_id, sha), 
	FOREIGN KEY(prompt_id) REFERENCES prompts (id)
);
INSERT INTO "responses" VALUES(1,'4226e4b83c6ff595','78a3bd228b9526d6fad65e9609909cbb41731d2dd8acc0e1304ac0937cdde3bb','first 0');
INSERT INTO "responses" VALUES(2,'4226e4b83c6ff595','90f28373856916d1612d790bece3609dead9aefdd278436d700817629434b941','second 0');
INSERT INTO "responses" VALUES(3,'9be7ee290d8456cb','a6ec3753140df2f6558213f8fa829b6322f6b376fb2b7ad54eb5cae3ec397d16','first 1');
INSERT INTO "responses" VALUES(4,'9be7ee290d8456cb','d379492b096f12f1526f5310088e630f173c5ea1395938f9f3103fcc9ea34f43','second 1');
INSERT INTO "responses" VALUES(5,'b45844fbfbd72eb3','deca9512105807ca59ed57fda3af70c3574774c6ebfac4e8a831407e16f984c5','first 2');
INSERT INTO "responses" VALUES(6,'b45844fbfbd72eb3','f6e468a19b8be16665f6482772cf86720f6d00c9110d192cb1190a8fa062bba5','second 2');
CREATE TABLE rounds (
	id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	overlap INTEGER NOT NULL, 
	lease DOUBLE NOT NULL, 
	salt VARCHAR NOT NULL, 
	state VARCHAR DEFAULT 'open' NOT NULL, 
	rules JSON, 
	part_of INTEGER, 
	purpose VARCHAR DEFAULT 'label' NOT NULL, 
	PRIMARY KEY (id), 
	CHECK (state in ('open', 'paused', 'closed')), 
	CHECK (purpose in ('label', 'check', 'repeat')), 
	CHECK (kind in ('person', 'model', 'simulated')), 
	CHECK (overlap >= 1), 
	UNIQUE (name), 
	FOREIGN KEY(part_of) REFERENCES rounds (id)
);
INSERT INTO "rounds" VALUES(1,'r','person',1,1800.0,'','open',NULL,NULL,'label');
CREATE TABLE sessions (
	sha VARCHAR NOT NULL, 
	annotator_id INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (sha), 
	FOREIGN KEY(annotator_id) REFERENCES annotators (id)
);
CREATE TABLE slots (
	id INTEGER NOT NULL, 
	task_id INTEGER NOT NULL, 
	round_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	priority DOUBLE NOT NULL, 
	active BOOLEAN NOT NULL, 
	reserved_id INTEGER, 
	state VARCHAR NOT NULL, 
	annotator_id INTEGER, 
	lease INTEGER NOT NULL, 
	lease_until DOUBLE, 
	PRIMARY KEY (id), 
	UNIQUE (task_id, number), 
	UNIQUE (annotator_id, task_id), 
	CHECK (number >= 0), 
	CHECK (state in ('free', 'open', 'done')), 
	CHECK ((state = 'free') = (annotator_id is null)), 
	CHECK (reserved_id is null or annotator_id is null or reserved_id = annotator_id), 
	FOREIGN KEY(task_id) REFERENCES tasks (id), 
	FOREIGN KEY(round_id) REFERENCES rounds (id), 
	FOREIGN KEY(reserved_id) REFERENCES annotators (id), 
	FOREIGN KEY(annotator_id) REFERENCES annotators (id)
);
INSERT INTO "slots" VALUES(1,1,1,0,5.37501509289106449429e-01,1,NULL,'done',1,1,NULL);
INSERT INTO "slots" VALUES(2,2,1,0,5.15219063923775255631e-01,1,NULL,'done',1,1,NULL);
INSERT INTO "slots" VALUES(3,3,1,0,4.17527255437990851838e-01,1,NULL,'free',NULL,0,NULL);
CREATE TABLE tasks (
	id INTEGER NOT NULL, 
	round_id INTEGER NOT NULL, 
	"key" VARCHAR NOT NULL, 
	prompt_id VARCHAR NOT NULL, 
	response_ids JSON NOT NULL, 
	policies JSON NOT NULL, 
	known JSON, 
	PRIMARY KEY (id), 
	UNIQUE (round_id, "key"), 
	FOREIGN KEY(round_id) REFERENCES rounds (id), 
	FOREIGN KEY(prompt_id) REFERENCES prompts (id)
);
INSERT INTO "tasks" VALUES(1,1,'3cb7fe48317b760e','4226e4b83c6ff595','[1, 2]','[]',NULL);
INSERT INTO "tasks" VALUES(2,1,'920a1a87be4ce840','9be7ee290d8456cb','[3, 4]','[]',NULL);
INSERT INTO "tasks" VALUES(3,1,'0cedc1c2f082c9a2','b45844fbfbd72eb3','[5, 6]','[]',NULL);
CREATE TABLE views (
	slot_id INTEGER NOT NULL, 
	lease INTEGER NOT NULL, 
	annotator_id INTEGER NOT NULL, 
	display_order JSON NOT NULL, 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (slot_id, lease), 
	UNIQUE (slot_id, lease, annotator_id), 
	FOREIGN KEY(slot_id) REFERENCES slots (id), 
	FOREIGN KEY(annotator_id) REFERENCES annotators (id)
);
INSERT INTO "views" VALUES(1,1,1,'[0, 1]',1.79529626284389615055e+09);
INSERT INTO "views" VALUES(2,1,1,'[0, 1]',1.79529626284389615055e+09);
CREATE UNIQUE INDEX rounds_parts ON rounds (part_of, purpose);
CREATE INDEX slots_free ON slots (round_id, priority DESC, id) WHERE state = 'free' AND active = 1;
CREATE INDEX slots_open ON slots (round_id, lease_until) WHERE state = 'open' AND active = 1;
CREATE INDEX slots_count ON slots (round_id, active, state);
CREATE INDEX slots_mine ON slots (annotator_id, round_id, state);
CREATE TRIGGER slots_stay BEFORE update ON slots WHEN old.state = 'done' AND (new.state <> 'done' OR new.annotator_id <> old.annotator_id OR new.lease <> old.lease) BEGIN SELECT RAISE(ABORT, 'done slots stay done'); END;
CREATE TRIGGER slots_no_delete BEFORE delete ON slots BEGIN SELECT RAISE(ABORT, 'slots are never removed'); END;
CREATE TRIGGER views_no_update BEFORE update ON views BEGIN SELECT RAISE(ABORT, 'views is append-only'); END;
CREATE TRIGGER views_no_delete BEFORE delete ON views BEGIN SELECT RAISE(ABORT, 'views is append-only'); END;
CREATE INDEX judgements_annotator ON judgements (annotator_id, id);
CREATE TRIGGER judgements_no_update BEFORE update ON judgements BEGIN SELECT RAISE(ABORT, 'judgements is append-only'); END;
CREATE TRIGGER judgements_no_delete BEFORE delete ON judgements BEGIN SELECT RAISE(ABORT, 'judgements is append-only'); END;
COMMIT;
